"""The inputs of modules, recorded during a forward pass."""
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def caught_inputs(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Yields a list for each module. While the context lasts, each call of the module appends its first argument to it."""
    caught: list[list[Tensor]] = [[] for _ in modules]
    with ExitStack() as stack:
        for module, inputs in zip(modules, caught):
            hook = module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            stack.callback(hook.remove)
        yield caught
