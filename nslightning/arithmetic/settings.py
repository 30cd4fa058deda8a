"""A named arithmetic, and how it comes into force."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nslightning._torch import set_cudnn
from nslightning.arithmetic.products import ORDERS, HalfProducts, Ordered, checked_order
from nslightning.arithmetic.record import flushes
from nslightning.arithmetic.rounding import RandomRounding
from nslightning.spelling import did_you_mean

__all__ = ["Arithmetic"]

_SWITCHES = (
    "half_products",
    "random_rounding",
    "tf32",
    "reduced_reductions",
    "deterministic",
    "cudnn_benchmark",
    "flush_to_zero",
)


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The settings of a process's arithmetic. By default float32 means float32, and sums are the installed library's.

    Args:
        order: Order of summation in linear layers: ``native``, ``bias_last``, ``sequential``, ``split_k=N``,
            ``blocks=N``, ``random_order`` (:func:`~nslightning.arithmetic.linear`).
        half_products: Half-precision products on a CPU have float32 sums (:class:`HalfProducts`).
        random_rounding: Round results up or down at random (:class:`RandomRounding`).
        tf32: Float32 products and convolutions on CUDA may round their operands to TF32.
        reduced_reductions: Half-precision products on CUDA may add up in half precision.
        deterministic: Refuse operations that add up in no fixed order.
        cudnn_benchmark: cuDNN tries its algorithms and takes the fastest: which one may change from run to run. False
            leaves PyTorch's own switch, as ``deterministic`` does.
        flush_to_zero: Subnormal results on a CPU become 0.
        threads: Threads of a CPU; None leaves their number.
        seed: Seed of ``random_rounding``.

    Raises:
        ValueError: If a value is not admissible.

    Example:
        >>> Arithmetic.parse("bias_last+tf32")
        Arithmetic(bias_last+tf32)
        >>> Arithmetic.parse("split_k=4").order
        'split_k=4'
    """

    order: str = "native"
    half_products: bool = False
    random_rounding: bool = False
    tf32: bool = False
    reduced_reductions: bool = False
    deterministic: bool = False
    cudnn_benchmark: bool = False
    flush_to_zero: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checked_order(self.order)
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads}: at least one is needed")

    def __str__(self) -> str:
        words = [self.order] * (self.order != "native") + [name for name in _SWITCHES if getattr(self, name)]
        words += [
            f"{name}={value}" for name, value in (("threads", self.threads), ("seed", self.seed or None)) if value
        ]
        return "+".join(words) or "native"

    def __repr__(self) -> str:
        return f"Arithmetic({self})"

    @classmethod
    def parse(cls, words: str) -> Arithmetic:
        """Read an arithmetic from words joined by ``+``, as ``str`` writes it.

        Args:
            words: An order of summation, and any of ``half_products``, ``random_rounding``, ``tf32``,
                ``reduced_reductions``, ``deterministic``, ``cudnn_benchmark``, ``flush_to_zero``, ``threads=N``,
                ``seed=N``.

        Returns:
            The arithmetic.

        Raises:
            ValueError: If a word is not known.
        """
        settings: dict[str, Any] = {}
        for word in str(words).split("+"):
            name, _, number = word.strip().partition("=")
            if name in _SWITCHES and not number:
                settings[name] = True
            elif name in ("threads", "seed") and number.isdigit():
                settings[name] = int(number)
            else:
                try:
                    order = checked_order(word.strip())
                except ValueError:
                    known = [*ORDERS, *_SWITCHES, "threads=N", "seed=N"]
                    names = [word.partition("=")[0] for word in known]
                    meant = "" if name in names else did_you_mean(name, names, otherwise="")
                    raise ValueError(
                        f"arithmetic={words!r}: {word!r} is not one of {', '.join(known)}{meant}"
                        f"{'' if meant else '.'} Several are joined by +, as bias_last+tf32"
                    ) from None
                if "order" in settings:
                    raise ValueError(
                        f"arithmetic={words!r} names two orders of summation: {settings['order']}, {order}"
                    )
                settings["order"] = order
        return cls(**settings)

    @property
    def in_modes(self) -> bool:
        """Return whether it needs to see each operation, which a compiled network hides."""
        return self.order != "native" or self.random_rounding or self.half_products

    def switch(self) -> None:
        """Set PyTorch's switches for this process, for good: TF32, reductions, determinism, cuDNN, subnormals, threads.

        Orders of summation and roundings come with :meth:`applied` alone.
        """
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        set_cudnn("allow_tf32", self.tf32)
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = self.reduced_reductions
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = self.reduced_reductions
        if self.deterministic:
            # Without this variable cuBLAS refuses to compute; Lightning's `deterministic=True` sets it the same way.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if self.cudnn_benchmark:
            set_cudnn("benchmark", True)
        torch.set_flush_denormal(self.flush_to_zero)
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute like this inside the block; PyTorch's switches stand as before afterwards."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = (
            torch.get_float32_matmul_precision(),
            matmul.allow_tf32,
            cudnn.allow_tf32,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
            cudnn.benchmark,
        )
        strict = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        flushed, threads = flushes(), torch.get_num_threads()
        with ExitStack() as stack:
            try:
                self.switch()
                # The mode that is entered last sees a call first: halves are widened before their sums are ordered.
                if self.random_rounding:
                    stack.enter_context(RandomRounding(self.seed))
                if self.order != "native":
                    stack.enter_context(Ordered(self.order))
                if self.half_products:
                    stack.enter_context(HalfProducts())
                yield
            finally:
                torch.set_float32_matmul_precision(before[0])
                matmul.allow_tf32 = before[1]
                set_cudnn("allow_tf32", before[2])
                matmul.allow_fp16_reduced_precision_reduction = before[3]
                matmul.allow_bf16_reduced_precision_reduction = before[4]
                set_cudnn("benchmark", before[5])
                torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
                torch.set_flush_denormal(flushed)
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)
