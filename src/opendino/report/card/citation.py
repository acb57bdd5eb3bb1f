# SPDX-License-Identifier: Apache-2.0
"""How to cite: BibTeX of this package (CITATION.cff says the same) and of the method's paper."""

from __future__ import annotations

from opendino._version import __version__

AUTHORS = (
    "Oquab, Maxime and Darcet, Timothée and Moutakanni, Theo and Vo, Huy and Szafraniec, Marc and Khalidov, Vasil "
    "and Fernandez, Pierre and Haziza, Daniel and Massa, Francisco and El-Nouby, Alaaeldin and Howes, Russell and "
    "Huang, Po-Yao and Xu, Hu and Sharma, Vasu and Li, Shang-Wen and Galuba, Wojciech and Rabbat, Mike and "
    "Assran, Mido and Ballas, Nicolas and Synnaeve, Gabriel and Misra, Ishan and Jegou, Herve and Mairal, Julien "
    "and Labatut, Patrick and Joulin, Armand and Bojanowski, Piotr"
)
"""Of the paper, in its order (arXiv:2304.07193)."""
SOFTWARE = f"""@software{{opendino,
  title = {{opendino: the whole DINOv2 system in one package}},
  author = {{{{The opendino contributors}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}"""
PAPER = f"""@misc{{oquab2023dinov2,
  title = {{DINOv2: Learning Robust Visual Features without Supervision}},
  author = {{{AUTHORS}}},
  year = {{2023}},
  eprint = {{2304.07193}},
  archivePrefix = {{arXiv}}
}}"""
