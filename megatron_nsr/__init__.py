"""Reinforcement learning with verifiable rewards at Megatron scale, split by the sign of the reward."""

__version__ = "0.1.0"
