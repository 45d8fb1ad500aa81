"""Encoders for the architectures: stages of known networks, and feature extractors.

| backbone | network | needs |
| --- | --- | --- |
| `resnet(name)` | torchvision's ResNets, also dilated, in stem and 4 stages | `gradbal[vision]` |
| `SegNet(widths)` | the SegNet of the MTAN papers, in stages down and up | |
| `sequential(model, at)` | any `nn.Sequential`, cut at indices | |
| `MoleculeEncoder()` | NNConv, GRU and Set2Set, for QM9 | `gradbal[molecules]` |
| `TextEncoder(config)` | an encoder of transformers | `gradbal[text]` |
| `ASPPHead(c, outputs)` | DeepLab's head | `gradbal[vision]` |
"""

from gradbal.nn.backbones.aspp import ASPPHead
from gradbal.nn.backbones.molecules import MoleculeEncoder
from gradbal.nn.backbones.resnet import resnet
from gradbal.nn.backbones.segnet import SegNet
from gradbal.nn.backbones.sequential import sequential
from gradbal.nn.backbones.text import TextEncoder

__all__ = [
    "ASPPHead",
    "MoleculeEncoder",
    "SegNet",
    "TextEncoder",
    "resnet",
    "sequential",
]
