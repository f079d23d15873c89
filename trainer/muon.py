"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

`torch.optim.Muon` (Jordan et al. 2024) orthogonalises each matrix's update and takes matrices only. Embeddings,
modulations, norms and the output layer stay with AdamW. Updates are scaled to AdamW's size ("match_rms_adamw",
Moonlight, arXiv 2502.16982), so both learning rates are of one kind.
"""

import torch
from torch import nn

from ..core.errors import InputError

_BLOCKS = ("transformer_blocks.", "encoder.layers.", "connector.layers.")


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix of a transformer block, not one of its modulations (`norm1.linear`, ...)."""
    return parameter.ndim == 2 and any(block in name for block in _BLOCKS) and ".norm" not in name


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer out of two, with one list of groups and one state, so schedules and checkpoints see no difference.

    Args:
        matrices: parameters (rows, columns) for Muon.
        rest: parameter groups for AdamW, as torch takes them.
        muon_lr: Muon's learning rate.
        weight_decay: Muon's decoupled weight decay; AdamW's is in its groups.
        adamw: further arguments of `torch.optim.AdamW` (`lr`, `betas`, ...).

    Raises:
        InputError: torch is older than 2.9, which brought `torch.optim.Muon`.
    """

    def __init__(self, matrices: list[nn.Parameter], rest: list[dict], muon_lr: float, weight_decay: float, **adamw):
        if not hasattr(torch.optim, "Muon"):
            raise InputError("muon_learning_rate", found=f"torch {torch.__version__}", expected="torch 2.9 or newer")
        self.muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        """Take a state back; both parts see it."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss
