"""Large-scale meta-learning with continual trajectory shifting, one task learner per rank."""

__version__ = "0.1.0"
