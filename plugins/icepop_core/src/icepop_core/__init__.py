"""IcePop: masked and calibrated policy-gradient terms (Ring-1T, arXiv 2510.18855, section 2.3.2).

Plain PyTorch on plain tensors, so that every trainer plugin can use it without importing another.
"""

from icepop_core.discrepancy import discrepancy_sums, merge_discrepancy, summarize_discrepancy
from icepop_core.mask import DEFAULT_ALPHA, DEFAULT_BETA, IcePopWeights, check_band, icepop_weights
from icepop_core.objective import group_advantages, policy_loss

__all__ = [
    "DEFAULT_ALPHA",
    "DEFAULT_BETA",
    "IcePopWeights",
    "check_band",
    "discrepancy_sums",
    "group_advantages",
    "icepop_weights",
    "merge_discrepancy",
    "policy_loss",
    "summarize_discrepancy",
]
