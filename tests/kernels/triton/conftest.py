"""Where these tests run: on a GPU if TRITON_INTERPRET=0 is set, else under the interpreter."""

import pytest


@pytest.fixture(scope="session")
def device():
    import torch

    from lowbit.kernels.triton.device import interpreted

    return torch.device("cpu") if interpreted() else torch.device("cuda", torch.cuda.current_device())
