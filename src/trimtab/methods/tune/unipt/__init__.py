"""UniPT (Diao et al., CVPR 2024): a parallel network that reads a frozen tower's block outputs.

    h_0 --block--> h_1 --block--> ... --block--> h_N          the tower: frozen, in evaluation mode, no graph kept
     |              |                             |
    Down_0         Down_1                        Down_N        D -> d each                            trained
     |              |                             |
     z_0            z_1          ...              A = z_N      (B, L, d); the anchor is the last
     |              |                             |
     +--- M_l = attend(A, z_l) ---+               |            S = L1(relu(A z_l^T * mask)),  M_l = S z_l (+ z_l)
                  |                               |
        M = sum_l c_l M_l  <--- c = softmax_l(w . (mean A * mean z_l) + b)   one confidence a layer and sample
                  |                               |
              project(M) ------------(+)----------+
                                      |
                                     Up  -> what the tower hands on from now on

Nothing is back-propagated through the tower, so that training keeps only the side network's activations. To read the
computation, open `plain`; `sides` has the modules of each use, which compute the same and keep less, with the kernels
of `core`, `down` and `pools`. `forms` says which of them a tower gets, `method` attaches them to a model.
"""

from trimtab.methods.tune.unipt.method import UniPT, UniPTSettings
from trimtab.methods.tune.unipt.sides import (
    PUBLISHED,
    Computation,
    DecoderUniPT,
    GridUniPT,
    PyramidUniPT,
    TokenUniPT,
    VectorUniPT,
)

__all__ = [
    "PUBLISHED", "Computation", "DecoderUniPT", "GridUniPT", "PyramidUniPT", "TokenUniPT", "UniPT", "UniPTSettings",
    "VectorUniPT",
]  # fmt: skip
