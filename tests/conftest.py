"""One thread per process: small tensors gain nothing from more, and tests run side by side."""

import torch

torch.set_num_threads(1)
