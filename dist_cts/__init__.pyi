from dist_cts.algorithms.table import ALGORITHMS as ALGORITHMS
from dist_cts.algorithms.table import Algorithm as Algorithm
from dist_cts.checkpoint.phi import load_phi as load_phi
from dist_cts.data.datasets import DATASETS as DATASETS
from dist_cts.data.hugging_face import HuggingFace as HuggingFace
from dist_cts.data.streams import Stream as Stream
from dist_cts.losses import LOSSES as LOSSES
from dist_cts.losses import Loss as Loss
from dist_cts.losses import Metric as Metric
from dist_cts.models import MODELS as MODELS
from dist_cts.models import Architecture as Architecture
from dist_cts.run.config import TrainConfig as TrainConfig
from dist_cts.run.meta_test import MetaTestConfig as MetaTestConfig
from dist_cts.run.meta_test import meta_test as meta_test
from dist_cts.run.script import meta_test_tasks as meta_test_tasks
from dist_cts.run.script import meta_train_tasks as meta_train_tasks
from dist_cts.run.train import train as train

__version__: str
