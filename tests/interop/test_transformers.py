"""Models of lowbit inside transformers: loaded, quantized on load, saved, against lowbit's own decoder."""

import copy
import json
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install torch")
transformers = pytest.importorskip("transformers", reason="pip install transformers")

import lowbit  # noqa: E402
from lowbit.errors import CheckpointError, FormatError, RequestError, UnsupportedError  # noqa: E402
from lowbit.interop.transformers import LowbitConfig, PackedLinear, quantize_model  # noqa: E402
from lowbit.kernels import ACTIVATION_BITS  # noqa: E402
from lowbit.kernels.reference import matmul_reference, matmul_tolerance  # noqa: E402
from lowbit.model.checkpoint import open_checkpoint  # noqa: E402
from lowbit.model.loader import load_model  # noqa: E402

from ..model import tiny_models  # noqa: E402

FINE = lowbit.Scheme("int4-g32", activations="int16", kv_bits=16)
COARSE = lowbit.Scheme("int4-g32", kv_bits=16)
TOKENS = tiny_models.token_ids(24)
# Networks that differ in what their modules fuse, tie or name.
FEW = [name for name in ("llama-tied", "qwen2", "phi3", "gpt2", "opt", "neox") if name in tiny_models.CASES]


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """Return a function that gives the directory of a small random model of floats."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "floats"
            tiny_models.save(tiny_models.build(tiny_models.CASES[name]), folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def llama(floats, tmp_path):
    """(directory of floats, directory of the same in int4)."""
    lowbit.quantize(floats("llama-tied"), COARSE, tmp_path / "int4", verify=False)
    return floats("llama-tied"), tmp_path / "int4"


def own_logits(folder, tokens=TOKENS):
    loaded = load_model(folder)
    cache = loaded.cache()
    return loaded.decoder.logits(np.array(tokens, np.int32), [cache], [len(tokens)], all=True)


def same_weights(one, other):
    """Do two lowbit directories hold equal bits under equal names?"""
    first, second = open_checkpoint(one), open_checkpoint(other)
    if sorted(first.names()) != sorted(second.names()):
        return False
    packed = [name for name in first.names() if len(first.shape(name)) == 2]
    for name in packed:
        (meta, arrays), (meta2, arrays2) = first.matrix(name).state(), second.matrix(name).state()
        if meta != meta2 or not all(np.array_equal(arrays[key], arrays2[key]) for key in arrays):
            return False
    return all(np.array_equal(first.read(name), second.read(name)) for name in first.names())


@pytest.mark.interop(type="lowbit directory", direction="write", against="transformers")
@pytest.mark.parametrize("name", sorted(tiny_models.CASES))
def test_every_way_in_gives_the_same_model(floats, tmp_path, name):
    """A directory of `lowbit quantize`, quantizing on load, what that saves: equal bits and logits."""
    source = floats(name)
    lowbit.quantize(source, FINE, tmp_path / "ours", verify=False)
    ours = load(tmp_path / "ours")
    here = load(source, quantization_config=FINE)
    expected = tiny_models.logits(ours, TOKENS)
    np.testing.assert_array_equal(tiny_models.logits(here, TOKENS), expected)
    here.save_pretrained(tmp_path / "saved")
    assert same_weights(tmp_path / "ours", tmp_path / "saved")
    np.testing.assert_array_equal(tiny_models.logits(load(tmp_path / "saved"), TOKENS), expected)
    ours.save_pretrained(tmp_path / "again")
    assert same_weights(tmp_path / "ours", tmp_path / "again")
    assert json.loads((tmp_path / "again/lowbit.json").read_text()) == json.loads(
        (tmp_path / "ours/lowbit.json").read_text()
    )


@pytest.mark.interop(type="lowbit directory", direction="write", against="transformers")
@pytest.mark.parametrize("name", sorted(tiny_models.CASES))
def test_logits_are_those_of_our_decoder_and_of_the_decoded_weights(floats, tmp_path, name):
    """With int16 activations, of 15 bits: both differ by rounding only; a wrong row or norm is 1 and more."""
    lowbit.quantize(floats(name), FINE, tmp_path / "ours", verify=False)
    model = load(tmp_path / "ours")
    found = tiny_models.logits(model, TOKENS)
    decoded = tiny_models.logits(load(tmp_path / "ours").dequantize(), TOKENS)
    assert np.abs(found - decoded).max() < 2e-3 * np.abs(decoded).max()
    try:
        expected = own_logits(tmp_path / "ours")
    except (UnsupportedError, ValueError) as error:
        pytest.skip(f"no native decoder: {error}")
    assert np.abs(found - expected).max() < 4e-3 * np.abs(expected).max()


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("format", ["int4-g32", "nf4-g32", "ternary", "bcq3-g32", "fp16"])
def test_a_linear_module_is_the_reference_product(rng, format, activations):
    weight = rng.normal(size=(70, 96)).astype(np.float32)
    linear = torch.nn.Linear(96, 70)
    linear.weight.data = torch.from_numpy(weight)
    holder = _holder(linear)
    quantize_model(holder, lowbit.Scheme(format, activations=activations))
    x = rng.normal(size=(2, 5, 96)).astype(np.float32)
    found = holder.linear(torch.from_numpy(x)).detach().numpy() - linear.bias.detach().numpy()
    matrix = holder.linear.parts[0].matrix
    bits = ACTIVATION_BITS[activations]
    expected = matmul_reference(x.reshape(-1, 96), matrix, bits)
    tolerance = matmul_tolerance(x.reshape(-1, 96), matrix, bits)
    assert (np.abs(found.reshape(-1, 70) - expected) <= tolerance + 1e-5).all()
    alone = holder.linear(torch.from_numpy(x[1:, 3:4]))
    np.testing.assert_array_equal(alone.detach()[0, 0], holder.linear(torch.from_numpy(x))[1, 3].detach())


def _holder(linear):
    """The least that quantize_model takes for a transformers model: one linear module."""

    class Holder(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.linear = linear

        def get_input_embeddings(self):
            return None

        def get_output_embeddings(self):
            return None

    return Holder(transformers.PretrainedConfig())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_activations_of_every_type(floats, tmp_path, dtype):
    lowbit.quantize(floats("llama-tied"), FINE, tmp_path / "ours", verify=False)
    model = load(tmp_path / "ours", dtype=getattr(torch, dtype))
    with torch.no_grad():
        found = model(torch.tensor([TOKENS])).logits
    assert found.dtype == getattr(torch, dtype)
    exact = tiny_models.logits(load(tmp_path / "ours", dtype=torch.float32), TOKENS)
    limit = {"bfloat16": 2**-5, "float16": 2**-8, "float32": 0.0}[dtype] * np.abs(exact).max()
    assert np.abs(found[0].float().numpy() - exact).max() <= limit


def test_float32_tensors_are_neither_copied_in_nor_out(llama, monkeypatch):
    """The native call sees the memory of the input, and its result is the memory of the output."""
    from lowbit import _native

    seen = {}

    def watch(values, matrices, bits):
        seen["in"] = values.ctypes.data
        result = product(values, matrices, bits)
        seen["out"] = result.ctypes.data
        return result

    product = _native.matmul_group
    monkeypatch.setattr(_native, "matmul_group", watch)
    linear = load(llama[1]).model.layers[0].mlp.up_proj
    x = torch.randn(3, 96)
    y = linear(x)
    assert (x.data_ptr(), y.data_ptr()) == (seen["in"], seen["out"])


def test_weights_are_mapped_not_copied(llama):
    """The buffers of a loaded model lie in the mapped file."""
    model = load(llama[1])
    checkpoint = model.model.layers[0].mlp.up_proj.parts[0].matrix
    codes = checkpoint.terms[0].codes
    base = codes
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert (
        isinstance(base, np.memmap) or isinstance(base.base, np.memmap) or "mmap" in type(base.base).__name__
    )
    stored = dict(model.named_buffers())["model.layers.0.mlp.up_proj.parts.0.0.codes"]
    assert stored.data_ptr() == codes.ctypes.data


def test_generate_is_greedy_by_the_same_logits(llama):
    model = load(llama[1])
    prompt = torch.tensor([TOKENS[:9]])
    out = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out[0, 9:].tolist() == tiny_models.greedy(model, TOKENS[:9], 6)
    batch = torch.tensor([TOKENS[:9], TOKENS[3:12]])
    both = model.generate(batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert both[0].tolist() == out[0].tolist()


def test_pipeline(tiny_model, tmp_path):
    """transformers' text-generation pipeline, from a directory of ours with its tokenizer."""
    lowbit.quantize(tiny_model, "int4-g32", tmp_path / "int4", verify=False)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "int4"), device="cpu")
    assert isinstance(pipe.model.lm_head, PackedLinear)
    (answer,) = pipe("Hello", max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].startswith("Hello")
    model = lowbit.load(tmp_path / "int4", kv_bits=16)
    assert answer["generated_text"][5:] == model.generate("Hello", max_tokens=5, temperature=0).text


def test_gradients_pass_to_the_input(llama):
    linear = load(llama[1]).model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 96, requires_grad=True)
    linear(x).sum().backward()
    expected = linear.dequantize().sum(0).expand(2, 3, 96)
    torch.testing.assert_close(x.grad, expected)
    assert not [p for p in linear.parameters() if p.requires_grad]


def test_other_devices_are_refused(llama):
    for device_map in ("cuda", {"": "cuda:0"}, {"model": 0, "lm_head": "cpu"}, torch.device("cuda")):
        with pytest.raises(UnsupportedError, match="run on the CPU"):
            load(llama[1], device_map=device_map)
    with pytest.raises(UnsupportedError, match="run on the CPU"):
        load(llama[0], quantization_config=COARSE, device_map="cuda")
    model = load(llama[1])
    before = tiny_models.logits(model, TOKENS)
    with pytest.raises(UnsupportedError, match="dequantize"):
        model.to("meta")  # any other device; there is no GPU here
    np.testing.assert_array_equal(tiny_models.logits(model, TOKENS), before)
    with pytest.raises(UnsupportedError, match="run on the CPU"):
        model.lm_head(torch.empty(1, 96, device="meta"))
    assert not model.hf_quantizer.is_trainable


def test_state_dict_copies_and_pickles(llama):
    model = load(llama[1])
    expected = tiny_models.logits(model, TOKENS)
    for other in (copy.deepcopy(model.model), pickle.loads(pickle.dumps(model.model))):
        with torch.no_grad():
            torch.testing.assert_close(
                other(torch.tensor([TOKENS])).last_hidden_state,
                model.model(torch.tensor([TOKENS])).last_hidden_state,
                rtol=0,
                atol=0,
            )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = load(llama[1])
    key = "model.layers.0.mlp.up_proj.parts.0.0.scales"
    changed.load_state_dict({**state, key: torch.zeros_like(state[key])})
    assert np.abs(tiny_models.logits(changed, TOKENS) - expected).max() > 0.1
    changed.load_state_dict(state)
    np.testing.assert_array_equal(tiny_models.logits(changed, TOKENS), expected)
    with pytest.raises(RuntimeError, match=r"required torch\.uint8"):
        changed.load_state_dict({**state, key.replace("scales", "codes"): state[key]})


def test_bytes_are_those_of_the_packed_weights(llama):
    model = load(llama[1])
    packed = sum(matrix.nbytes for matrix in load_model(llama[1]).weights.values())
    floats = sum(p.numel() * p.element_size() for p in model.parameters())
    assert packed + floats <= model.get_memory_footprint() < packed + floats + 1024


def test_modules_may_stay_floats(floats, tmp_path):
    config = LowbitConfig("int4-g32", modules_to_not_convert=["lm_head", "*.down_proj"])
    model = load(floats("llama"), quantization_config=config)
    kept = load(floats("llama"))
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, kept.model.layers[1].mlp.down_proj.weight)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again.lm_head) is torch.nn.Linear
    np.testing.assert_array_equal(tiny_models.logits(again, TOKENS), tiny_models.logits(model, TOKENS))
    own_logits(tmp_path / "saved")  # lowbit multiplies with the same floats


def test_methods_without_calibration(floats):
    fine = load(floats("llama"), quantization_config=LowbitConfig("int3a-g32", method="hqq"))
    nearest = load(floats("llama"), quantization_config=lowbit.Scheme("int3a-g32"))
    for module, same in (("lm_head", True), ("model.layers.0.mlp.up_proj", False)):
        pair = [model.get_submodule(module).dequantize() for model in (fine, nearest)]
        assert torch.equal(*pair) == same
    with pytest.raises(UnsupportedError, match="needs calibration"):
        load(floats("llama"), quantization_config=LowbitConfig("int3-g32", method="gptq"))
    with pytest.raises(UnsupportedError, match="already"):
        quantize_model(fine, "int4-g32")


def test_a_family_that_lowbit_does_not_run(tmp_path):
    """Any transformers model can be quantized, saved and loaded; its names stay its own."""
    config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=96)
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(config).eval()
    floats = tiny_models.logits(model, [1, 5, 9, 80])
    quantize_model(model, FINE)
    expected = tiny_models.logits(model, [1, 5, 9, 80])
    assert 0 < np.abs(expected - floats).max() < 0.2 * np.abs(floats).max()
    model.save_pretrained(tmp_path / "bloom")
    np.testing.assert_array_equal(tiny_models.logits(load(tmp_path / "bloom"), [1, 5, 9, 80]), expected)
    with pytest.raises(UnsupportedError, match="bloom"):
        load_model(tmp_path / "bloom")


def test_refusals(floats, tmp_path, llama):
    with pytest.raises(FormatError, match=r"model\.layers\.0.*group"):
        load(floats("llama"), quantization_config=lowbit.Scheme("int4-g64"))
    with pytest.raises(UnsupportedError, match="version 2"):
        LowbitConfig("int4-g32", version=2)
    with pytest.raises(UnsupportedError, match=r"\['bits'\]"):
        LowbitConfig("int4-g32", bits=4)
    with pytest.raises(RequestError, match="push_to_hub"):
        load(llama[1]).save_pretrained(tmp_path / "x", push_to_hub=True)
    with pytest.raises(RequestError, match="variant"):
        load(llama[1]).save_pretrained(tmp_path / "x", variant="fp16")
    assert not (tmp_path / "x").exists()


def test_a_directory_must_hold_what_the_model_has(llama, tmp_path):
    folder = llama[1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match="missing"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="no place"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match="different models"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    base = transformers.AutoModel.from_pretrained(folder)  # without the head
    assert base(torch.tensor([TOKENS])).last_hidden_state.shape == (1, 24, 96)
    (folder / "lowbit.json").unlink()
    with pytest.raises(CheckpointError, match=r"lowbit\.json"):
        load(folder)
