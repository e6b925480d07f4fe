"""Sites of every kind on their way out: unwrapped, pickled, exported and built again."""

import collections
import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn
from torch.nn.utils.rnn import pack_padded_sequence
from wrapping_grown import blueprint, load_grafts

import esper
from esper.state.layer_call import LayerCall

Outputs = collections.namedtuple("Outputs", ["hidden", "aux"])


class Bend(nn.Module):
    """A kernel of one input."""

    def __init__(self, size=6):
        super().__init__()
        self.down = nn.Linear(size, 2)
        self.up = nn.Linear(2, size)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


class Masked(nn.Module):
    """A kernel that reads two of its host's inputs and a keyword, by the host's names."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, query, key, *, key_padding_mask):
        kept = key * ~key_padding_mask.unsqueeze(-1)
        return torch.tanh(self.up(query + kept.sum(1, keepdim=True)))


class Variadic(nn.Module):
    """A block like those of transformers: one input, keywords that pass through, a tuple."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, hidden, shift=None, **kwargs):
        hidden = hidden if shift is None else hidden + shift
        return self.fc(hidden) * kwargs.get("scale", 1.0), kwargs


class Positional(nn.Module):
    """A block of any number of inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, hidden, *others):
        return self.fc(hidden) + sum(others)


class Named(nn.Module):
    """A block that gives a named tuple."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return Outputs(self.fc(x), x)


def hidden():
    return torch.randn(3, 4, 6)


def call(*args, **kwargs):
    return LayerCall(args, kwargs)


def masked():
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    return call(hidden(), torch.randn(3, 5, 6), torch.randn(3, 5, 6), key_padding_mask=mask)


def attention():
    return nn.MultiheadAttention(6, 2, batch_first=True)


CASES = {
    "attention": (attention, Bend, "parallel", lambda: call(*[hidden()] * 3)),
    "attention_masked": (attention, Bend, "serial", masked),
    "attention_whole_call": (attention, Masked, "parallel", masked),
    "attention_by_attention": (attention, attention, "parallel", masked),
    "encoder_layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True),
        Bend,
        "serial",
        lambda: call(hidden()),
    ),
    "variadic": (Variadic, Bend, "parallel", lambda: call(hidden(), scale=0.5)),
    "positional": (Positional, Bend, "serial", lambda: call(hidden(), hidden(), hidden())),
    "named": (Named, Bend, "parallel", lambda: call(hidden())),
    "embedding": (
        lambda: nn.Embedding(9, 6),
        Bend,
        "serial",
        lambda: call(torch.randint(9, (3, 4))),
    ),
    "lstm": (lambda: nn.LSTM(6, 6, batch_first=True), Bend, "serial", lambda: call(hidden())),
    "gru_with_hidden": (
        lambda: nn.GRU(6, 3, bidirectional=True),
        Bend,
        "serial",
        lambda: call(hidden(), hx=torch.zeros(2, 4, 3)),
    ),
    "layer_norm": (lambda: nn.LayerNorm(6), Bend, "serial", lambda: call(hidden())),
    "batch_norm": (lambda: nn.BatchNorm1d(6), Bend, "serial", lambda: call(torch.randn(5, 6))),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(2, 6, 3),
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 6, 3), nn.Tanh()),
        "parallel",
        lambda: call(torch.randn(2, 2, 4, 4)),
    ),
}


class Net(nn.Module):
    """A site and nothing else, so that it has a parent."""

    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, *args, **kwargs):
        return self.site(*args, **kwargs)


def grown(name, mode="add"):
    """Return a grown model in evaluation, the call that it was grown with, and what it gives."""
    torch.manual_seed(0)
    make, make_kernel, position, make_call = CASES[name]
    model = esper.wrap(Net(make()), select="site").eval()
    given = make_call()
    model.site.graft(0, make_kernel(), alpha=0.5, position=position, mode=mode, example=make_call())
    return model, given, model(*given.args, **given.kwargs)


def assert_same(left, right):
    """Compare two outputs bit for bit, tuples part by part."""
    assert type(left) is type(right)
    if isinstance(left, tuple):
        assert_same(left[0], right[0])
        assert len(left) == len(right)
        torch.testing.assert_close(list(left[1:]), list(right[1:]), rtol=0, atol=0)
    else:
        assert torch.equal(left, right)


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_an_unwrapped_site_gives_what_it_gave(name, mode):
    """Output, tuple and all, bit for bit; also copied, and saved and loaded."""
    model, given, expected = grown(name, mode)
    plain = esper.unwrap(model)
    assert isinstance(plain.site, fx.GraphModule)
    file = io.BytesIO()
    torch.save(plain.site, file)
    file.seek(0)
    loaded = Net(torch.load(file, weights_only=False))
    for each in (plain, copy.deepcopy(plain), loaded):
        assert_same(each(*given.args, **given.kwargs), expected)


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_exported_site_gives_what_it_gave(name, tmp_path):
    """A fresh host, built and loaded, answers as the grown model did."""
    model, given, expected = grown(name)
    esper.export(model, tmp_path)
    rebuilt = load_grafts(tmp_path).build(Net(CASES[name][0]())).eval()
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(rebuilt(*given.args, **given.kwargs), expected)


def test_a_packed_sequence_passes_through_a_plain_recurrent_site(tmp_path):
    """As through the layer: unwrapped, copied, saved and loaded, exported; then steps again."""
    model, given, expected = grown("lstm")
    packed = pack_padded_sequence(given.x, [4, 3, 2], batch_first=True)
    (wanted, *_), state = model(packed)
    esper.export(model, tmp_path)
    rebuilt = load_grafts(tmp_path).build(Net(CASES["lstm"][0]())).eval()
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    plain = esper.unwrap(model)
    file = io.BytesIO()
    torch.save(plain.site, file)
    file.seek(0)
    loaded = Net(torch.load(file, weights_only=False))
    for each in (plain, copy.deepcopy(plain), loaded, rebuilt):
        (found, *_), its_state = each(packed)
        assert torch.equal(found, wanted)
        assert torch.equal(its_state[0], state[0])
        assert_same(each(*given.args), expected)
    assert "h if is_packed else" in (tmp_path / "grafts.py").read_text()


def test_a_replaced_attention_keeps_its_weights():
    """At alpha 1 the host is idle but for the attention weights, which are passed on."""
    model, given, _ = grown("attention", "replace")
    model.site.set_alpha(0, 1.0)
    expected = model(*given.args)
    assert_same(esper.unwrap(model)(*given.args), expected)


def test_a_graph_takes_the_keywords_that_were_seen_and_refuses_others():
    """What it has no name for is a TypeError, and never dropped."""
    plain = esper.unwrap(grown("variadic")[0])
    x = hidden()
    plain(x, shift=1.0, scale=2.0)
    with pytest.raises(TypeError, match="gain"):
        plain(x, gain=2.0)


def test_exported_code_passes_on_every_keyword(tmp_path):
    """Code has **kwargs where the host has them, and *args."""
    for name, head, passed in [
        ("variadic", "forward(self, hidden, shift=None, **kwargs)", "shift, **kwargs)"),
        ("positional", "forward(self, hidden, *others)", "(hidden, *others)"),
    ]:
        model, _, _ = grown(name)
        esper.export(model, tmp_path / name)
        source = (tmp_path / name / "grafts.py").read_text().replace(" = None", "=None")
        assert head in source
        assert passed in source


def test_a_site_that_was_loaded_and_never_called_is_a_graph_too():
    """Without a call that was seen, what the host declares says whether it gives a tuple."""
    torch.manual_seed(0)
    x = hidden()
    for name, position, given in [
        ("encoder_layer", "parallel", (x,)),
        ("attention", "parallel", (x, x, x)),
        ("lstm", "serial", (x,)),
    ]:
        model = esper.wrap(Net(CASES[name][0]()), select="site").eval()
        kernel = blueprint(6, position=position)
        model.site.graft(0, kernel, alpha=0.5, example=call(*given))
        other = esper.wrap(Net(CASES[name][0]()), select="site").eval()
        other.load_state_dict(model.state_dict())
        assert_same(esper.unwrap(other)(*given), model(*given))


class Paired(nn.Module):
    """A block that gives its input beside its output, and takes floats of one dtype in a list."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, hidden, shifts=()):
        return sum(shifts, self.fc(hidden)), hidden


@pytest.mark.parametrize("kernel", [blueprint(6), Bend()], ids=["blueprint", "module"])
@pytest.mark.parametrize("shifts", [(), [hidden()]], ids=["none", "list"])
def test_a_model_that_moved_to_another_dtype_unwraps_to_what_it_gives(kernel, shifts):
    """The call that was seen is made in the dtype that the host has now."""
    model = esper.wrap(Net(Paired()), select="site").eval()
    model.site.graft(
        0, copy.deepcopy(kernel), alpha=0.5, mode="add", example=call(hidden(), shifts)
    )
    model.to(torch.bfloat16)
    x, moved = hidden().bfloat16(), [shift.bfloat16() for shift in shifts]
    expected = model(x, moved)
    assert_same(esper.unwrap(model)(x, moved), expected)


def test_a_host_of_two_dtypes_is_asked_in_the_dtype_that_was_seen():
    """Its first parameter says nothing about what it takes."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6, dtype=torch.float64))
            self.fc = nn.Linear(6, 6)

        def forward(self, hidden):
            return (self.fc(hidden) * self.gain.float(), hidden)

    model = esper.wrap(Net(Mixed()), select="site").eval()
    x = hidden()
    model.site.graft(0, Bend(), alpha=0.5, mode="add", example=x)
    expected = model(x)
    assert_same(esper.unwrap(model)(x), expected)


def test_a_site_that_no_longer_takes_what_was_seen_is_refused_and_nothing_changes():
    """The error names the layer, what was raised and what to do; the model answers as before."""
    site = Paired()
    model = esper.wrap(Net(site), select="site").eval()
    model.site.graft(0, Bend(), alpha=0.5, mode="add", example=hidden())
    site.fc, kept = nn.Linear(7, 7), site.fc
    with pytest.raises(ValueError, match=r"'site'.*RuntimeError.*example="):
        esper.unwrap(model)
    site.fc = kept
    assert list(esper.layers(model)) == ["site"]
    assert model(hidden())[0].shape == hidden().shape
