from dist_cts.checkpoint.phi import load_phi as load_phi
from dist_cts.run.config import TrainConfig as TrainConfig
from dist_cts.run.meta_test import MetaTestConfig as MetaTestConfig
from dist_cts.run.meta_test import meta_test as meta_test
from dist_cts.run.train import train as train

__version__: str
