"""Training steps on a device that is not there, and a count of what would make the host wait."""

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, META = torch.device("cuda:0"), torch.device("meta")
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount")


class HostWork(TorchDispatchMode):
    """Notes each operation that waits for a device, and each transfer between the host and a device.

    Attributes:
        met: The events: the operation's name, and the target of a transfer.
        calls: How many operations there were.
    """

    def __init__(self):
        super().__init__()
        self.met, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        devices = [t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.calls += 1
        if name in _READS and {"cuda", "meta"} & set(devices):
            self.met.append(name)
            if name == "_local_scalar_dense":  # the value is any
                return 1.0 if args[0].is_floating_point() else 1
        if name == "_to_copy" and devices == ["meta"] and (kwargs or {}).get("device") == torch.device("cpu"):
            self.met.append("_to_copy meta to cpu")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)  # any values
        result = func(*args, **(kwargs or {}))
        made = [t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        # A number is a tensor on the host for some operators; its value is an argument of the kernel.
        if name in ("_to_copy", "copy_", "_copy_from") and devices and len({*devices, *made}) > 1:
            self.met.append(f"{name} {devices[-1]} to {made[0]}")
        return result


class Accelerator(CPUAccelerator):
    """Lightning's accelerator for a device that is not there."""

    def setup_device(self, device):
        """Nothing to set up."""


class Device(SingleDeviceStrategy):
    """Lightning's strategy for a device whose tensors have no values.

    Without a GPU, autograd runs no backward of fake CUDA tensors. Of meta tensors it does, and whatever looks at their
    values raises.
    """

    def __init__(self):
        super().__init__(device=META, accelerator=Accelerator())

    def teardown(self):
        """The module stays where it is: nothing can be read back."""
        self.precision_plugin.teardown()
