"""Backbones: the networks of torchvision, torch_geometric and transformers, and cut as a whole."""

import copy
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import NNConv
from torchvision.models.segmentation import deeplabv3
from transformers import BertConfig, BertModel, DistilBertConfig

from gradbal.nn import (
    MTAN,
    PLE,
    CrossStitch,
    HardParameterSharing,
    LearningToBranch,
    MMoE,
    SparseSharing,
)
from gradbal.nn.backbones import (
    ASPPHead,
    MoleculeEncoder,
    SegNet,
    TextEncoder,
    resnet,
    sequential,
)

TASKS = ("a", "b")


def one_by_one(stages: nn.Module, x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x)
    return x


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(1)
    return torchvision.models.resnet18()


def body(network: nn.Module, x: Tensor) -> Tensor:
    """What torchvision's ResNet pools, seen from outside."""
    seen = []
    handle = network.avgpool.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    network(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("size", [(64, 64), (33, 50)])
def test_resnet_is_torchvisions_in_five_stages(resnet18, size):
    network = copy.deepcopy(resnet18).eval()
    x = torch.randn(1, 3, *size)
    expected = body(network, x)
    stages = resnet(lambda: network)()
    assert len(stages) == 5
    assert torch.equal(stages(x), expected)
    assert torch.equal(one_by_one(stages, x), expected)
    outputs = [stages[: i + 1](x).shape[1] for i in range(5)]
    assert tuple(outputs) == stages.channels == (64, 64, 128, 256, 512)
    left_out = {*map(id, network.fc.parameters())}
    assert {*map(id, stages.parameters())} == {*map(id, network.parameters())} - left_out


def test_resnet_dilated_keeps_an_eighth():
    torch.manual_seed(1)
    stages = resnet("resnet50", dilated=True, norm_layer=nn.Identity)()
    torch.manual_seed(1)
    replaced = [False, True, True]
    network = torchvision.models.resnet50(
        replace_stride_with_dilation=replaced, norm_layer=nn.Identity
    )
    x = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        z = stages(x)
        assert z.shape == (1, 2048, 5, 5)
        assert torch.equal(z, body(network, x))
    assert stages.channels == (64, 256, 512, 1024, 2048)
    dilations = [{m.dilation for m in s.modules() if isinstance(m, nn.Conv2d)} for s in stages[3:]]
    assert dilations == [{(1, 1), (2, 2)}, {(1, 1), (2, 2), (4, 4)}]


def test_resnet_for_each_architecture(resnet18):
    """A factory gives as many networks as there are calls; MTAN knows its channels and stem."""
    made = []

    def small(**options):
        made.append(options)
        network = copy.deepcopy(resnet18)
        network.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        return network

    x = torch.randn(2, 3, 35, 32)
    factory = resnet(small)
    heads = {
        task: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1))
        for task in TASKS
    }
    mtan = MTAN(TASKS, factory, copy.deepcopy(heads), reduction=4)
    assert len(made) == 1
    assert len(mtan.masks["a"]) == 4
    assert [m[0].in_channels for m in mtan.masks["a"]] == [64, 256, 512, 1024]
    sum(y.square().mean() for y in mtan(x).values()).backward()
    assert all(p.grad is not None for p in mtan.parameters())
    stitched = CrossStitch(TASKS, factory, copy.deepcopy(heads))
    assert len(made) == 3
    with torch.no_grad():
        assert stitched.eval()(x)["b"].shape == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet19"}, "`model` must be one of .*resnet18.*found 'resnet19'"),
        ({"model": "vgg11"}, "found 'vgg11'"),
    ],
)
def test_resnet_of_a_wrong_name(options, message):
    with pytest.raises(ValueError, match=message):
        resnet(**options)


def test_resnet_that_cannot_be():
    with pytest.raises(ValueError, match="`dilated` must be False for a ResNet of basic blocks"):
        resnet("resnet18", dilated=True)()
    with pytest.raises(ValueError, match="must make a torchvision ResNet, found Linear"):
        resnet(lambda: nn.Linear(1, 1))()


def segnet_by_hand(net: SegNet, x: Tensor) -> Tensor:
    """Unpooling as a scatter into zeros, with the indices taken from the maxima themselves."""
    half = len(net) // 2
    sizes, places = [], []
    for down in net[:half]:
        p = down.rest(down.first(x))
        sizes.append(p.shape)
        n, c, h, w = p.shape
        windows = p[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2)
        windows = windows.permute(0, 1, 2, 4, 3, 5).flatten(-2)
        x, corner = windows.max(-1)
        rows = 2 * torch.arange(h // 2)[:, None] + corner // 2
        columns = 2 * torch.arange(w // 2) + corner % 2
        places.append(rows * w + columns)
    for up in net[half:]:
        size, place = sizes.pop(), places.pop()
        flat = torch.zeros(size, dtype=x.dtype).flatten(2)
        x = up.convolutions(flat.scatter(2, place.flatten(2), x.flatten(2)).view(size))
    return x


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (15, 11)])
def test_segnet(size):
    net = SegNet((3, 5, 4), in_channels=2).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    expected = segnet_by_hand(net, x)
    assert expected.shape == (2, 3, *size)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(one_by_one(net, x), expected)
    assert net(x[:1]).shape[0] == 1


def test_segnet_of_the_papers():
    net = SegNet()
    weights = [m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d)]
    down = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256)] + [(256, 256)] * 2
    down += [(256, 512)] + [(512, 512)] * 5
    up = [(512, 512)] * 3 + [(512, 256)] + [(256, 256)] * 2
    assert weights[:13] == [(o, i, 3, 3) for i, o in down]
    assert len(weights) == 26
    assert [(o, i) for o, i, *_ in weights[13:16]] == up[:3]
    assert weights[-1] == (64, 64, 3, 3)
    assert net.channels == (
        64,
        128,
        256,
        512,
        512,
        (512, 512),
        (512, 256),
        (256, 128),
        (128, 64),
        (64, 64),
    )


def test_segnet_stages_remember_and_copies_are_independent():
    net = SegNet((2, 3), in_channels=1).eval()
    with pytest.raises(RuntimeError, match="must run after its stage down"):
        net[3](torch.zeros(1, 2, 4, 4))
    x, y = torch.randn(2, 1, 1, 8, 8)
    expected = net(x)
    net[0](x)
    twin = copy.deepcopy(net)
    assert torch.equal(one_by_one(twin, y), twin(y))
    assert torch.equal(one_by_one(net, x), expected)
    assert twin[3].partner[0] is twin[0]
    assert not any("partner" in name for name in net.state_dict())


@pytest.mark.parametrize("architecture", [CrossStitch, LearningToBranch])
def test_segnet_stages_in_other_architectures(architecture):
    model = architecture(
        TASKS, lambda: SegNet((2, 3), in_channels=1), {t: nn.Conv2d(2, 1, 1) for t in TASKS}
    )
    outputs = model(torch.randn(2, 1, 9, 8))
    assert all(y.shape == (2, 1, 9, 8) for y in outputs.values())
    sum(y.square().mean() for y in outputs.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_segnet_as_an_expert_is_the_same_batched_or_not():
    models = []
    for batched in (False, True):
        torch.manual_seed(4)
        model = MMoE(
            TASKS,
            lambda: SegNet((2, 3), in_channels=1),
            {t: nn.Conv2d(2, 1, 1) for t in TASKS},
            num_experts=2,
            gate_input_dim=1,
            batched=batched,
        )
        models.append(model.eval())
    x = torch.randn(2, 1, 9, 8)
    loop, together = (model(x)["b"] for model in models)
    torch.testing.assert_close(together, loop)
    copy.deepcopy(models[1])


def test_segnet_wrong_arguments():
    with pytest.raises(ValueError, match="`widths` must have at least one stage"):
        SegNet(())
    with pytest.raises(ValueError, match="`widths` must be in"):
        SegNet((4, 0))
    with pytest.raises(TypeError, match="`in_channels` must be an integer"):
        SegNet((4,), in_channels=1.5)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize(("at", "lengths"), [([], [5]), ([2, 4], [2, 2, 1]), ([1], [1, 4])])
def test_sequential_is_the_network(at, lengths):
    torch.manual_seed(2)
    whole = network()
    torch.manual_seed(2)
    stages = sequential(network, at)()
    x = torch.randn(3, 4)
    assert [len(stage) for stage in stages] == lengths
    assert torch.equal(stages(x), whole(x))
    assert torch.equal(one_by_one(stages, x), whole(x))


def test_sequential_in_ple():
    model = PLE(
        TASKS,
        sequential(network, [2]),
        {t: nn.Linear(3, 1) for t in TASKS},
        num_shared=1,
        num_specific=1,
        gate_input_dims=[4, 5],
    )
    assert model(torch.randn(3, 4))["a"].shape == (3, 1)


def test_sequential_wrong_arguments():
    for at in ([2, 2], [3, 1]):
        with pytest.raises(ValueError, match="`at` must increase"):
            sequential(network, at)
    with pytest.raises(ValueError, match="`at` must be in"):
        sequential(network, [0])
    with pytest.raises(ValueError, match=r"`at` must be indices below 5.*found 5"):
        sequential(network, [2, 5])()
    with pytest.raises(TypeError, match="found a network, Sequential"):
        sequential(network(), [2])
    with pytest.raises(TypeError, match=r"must make an nn.Sequential, found Linear"):
        sequential(lambda: nn.Linear(1, 1), [])()


def molecule(n: int, seed: int) -> Data:
    draw = torch.Generator().manual_seed(seed)
    edges = torch.tensor(
        [[i, (i + 1) % n] for i in range(n)] + [[(i + 1) % n, i] for i in range(n)]
    )
    return Data(
        x=torch.rand(n, 11, generator=draw),
        edge_index=edges.T.contiguous(),
        edge_attr=torch.rand(2 * n, 5, generator=draw),
    )


def test_molecules_do_not_mix_and_atoms_have_no_order():
    encoder = MoleculeEncoder(dim=6, edge_dim=7)
    molecules = [molecule(n, seed) for seed, n in enumerate((3, 5, 4))]
    together = encoder(Batch.from_data_list(molecules))
    assert together.shape == (3, 6)
    for z, m in zip(together, molecules, strict=True):
        torch.testing.assert_close(z, encoder(Batch.from_data_list([m]))[0])
    m = molecules[1]
    order = torch.randperm(5)
    moved = Data(x=m.x[order], edge_index=torch.argsort(order)[m.edge_index], edge_attr=m.edge_attr)
    torch.testing.assert_close(encoder(Batch.from_data_list([moved]))[0], together[1])
    assert not torch.allclose(together[0], together[1], rtol=1e-3)


def test_molecules_are_the_network_of_the_benchmarks():
    encoder = MoleculeEncoder()
    # Linear, the network of NNConv's weights with its root and bias, GRU, LSTM of Set2Set, Linear.
    sizes = [11 * 64 + 64, (5 * 128 + 128) + (128 * 4096 + 4096) + 64 * 64 + 64]
    sizes += [2 * 3 * 64 * 64 + 2 * 3 * 64, 4 * 64 * 128 + 4 * 64 * 64 + 2 * 4 * 64, 128 * 64 + 64]
    assert sum(p.numel() for p in encoder.parameters()) == sum(sizes)
    assert isinstance(encoder.conv, NNConv)
    assert encoder.conv.aggr == "mean"
    ran = []
    encoder.conv.register_forward_hook(lambda *_: ran.append("conv"))
    model = HardParameterSharing(TASKS, lambda: encoder, {t: nn.Linear(64, 1) for t in TASKS})
    outputs = model(Batch.from_data_list([molecule(4, 1), molecule(6, 2)]))
    assert ran == ["conv"] * 3
    sum(y.square().mean() for y in outputs.values()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_molecules_wrong_arguments():
    with pytest.raises(ValueError, match="`dim` must be in"):
        MoleculeEncoder(dim=0)
    with pytest.raises(TypeError, match="`steps` must be an integer"):
        MoleculeEncoder(steps=1.5)


SMALL = {"vocab_size": 40, "max_position_embeddings": 16}
BERT = BertConfig(
    **SMALL, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_text_padding_changes_nothing(pooling):
    encoder = TextEncoder(BERT, pooling).eval()
    ids = torch.randint(5, 40, (1, 6))
    expected = encoder(ids)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 4])
    found = encoder({"input_ids": padded, "attention_mask": mask})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape == (1, 8)
    hidden = encoder.model(ids).last_hidden_state
    wanted = hidden[:, 0] if pooling == "first" else hidden.mean(1)
    torch.testing.assert_close(expected, wanted)


@pytest.mark.parametrize(
    "config", [BERT, DistilBertConfig(**SMALL, dim=8, n_layers=1, n_heads=2, hidden_dim=12)]
)
def test_text_has_no_dead_parameters(config):
    model = HardParameterSharing(
        TASKS, lambda: TextEncoder(config), {t: nn.Linear(8, 1) for t in TASKS}
    )
    ids = torch.randint(5, 40, (2, 6))
    outputs = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    sum(y.square().mean() for y in outputs.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_text_with_a_model_that_is_there():
    made = BertModel(BERT).eval()
    encoder = TextEncoder(made, "first")
    ids = torch.randint(5, 40, (2, 6))
    assert torch.equal(encoder(ids), made(ids).last_hidden_state[:, 0])
    with pytest.raises(TypeError, match="configuration or a model of transformers, found str"):
        TextEncoder("bert-base-cased")
    with pytest.raises(ValueError, match="`pooling` must be one of"):
        TextEncoder(BERT, "max")


def test_text_with_masks():
    model = SparseSharing(
        TASKS, lambda: TextEncoder(BERT), {t: nn.Linear(8, 1) for t in TASKS}
    ).eval()
    ids = torch.randint(5, 40, (2, 6))
    torch.testing.assert_close(model(ids, "a"), model.heads["a"](model.encoder(ids)))


def test_aspp_is_torchvisions_head():
    torch.manual_seed(3)
    head = ASPPHead(8, 5, rates=(2, 3)).eval()
    torch.manual_seed(3)
    theirs = deeplabv3.DeepLabHead(8, 5, (2, 3)).eval()
    x = torch.randn(2, 8, 6, 7)
    assert torch.equal(head(x), theirs(x))
    assert ASPPHead(8, 5, size=(20, 31), width=4)(x).shape == (2, 5, 20, 31)
    with pytest.raises(ValueError, match="`rates` must be in"):
        ASPPHead(8, 5, rates=(0,))


WITHOUT = """
import sys
for package in ("torchvision", "torch_geometric", "transformers"):
    sys.modules[package] = None
import gradbal.nn
from gradbal.nn.backbones import *
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & {"torchvision", "torch_geometric", "transformers"}
SegNet((2,))(__import__("torch").zeros(2, 3, 4, 4))
for use in (resnet, MoleculeEncoder, lambda: TextEncoder(None), lambda: ASPPHead(1, 1)):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
"""


def test_extras_are_asked_for_where_they_are_used():
    run = [sys.executable, "-c", WITHOUT]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [
        'resnet needs torchvision, found none; type: pip install "gradbal[vision]"',
        'MoleculeEncoder needs torch_geometric, found none; type: pip install "gradbal[molecules]"',
        'TextEncoder needs transformers, found none; type: pip install "gradbal[text]"',
        'ASPPHead needs torchvision, found none; type: pip install "gradbal[vision]"',
    ]


def test_an_error_inside_an_extra_is_not_taken_for_its_absence(tmp_path, monkeypatch):
    from gradbal.nn.backbones._extras import needed

    (tmp_path / "brokenextra.py").write_text("import something_else_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="something_else_that_is_missing") as raised:
        needed("brokenextra", "broken", "Test")
    assert "pip install" not in str(raised.value)
