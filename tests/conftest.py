"""One thread for every test: the machines are small and shared, and results do not change."""

import torch

torch.set_num_threads(1)
