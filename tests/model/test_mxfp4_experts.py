"""gpt-oss as it is published: experts in MXFP4, read as codes and run as they are."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lowbit._native")
from safetensors.torch import load_file, save_file  # noqa: E402

from lowbit.model.checkpoint import open_checkpoint  # noqa: E402
from lowbit.model.loader import load_model  # noqa: E402
from lowbit.model.reference import reference_logits  # noqa: E402

from . import tiny_models  # noqa: E402

EXPERTS, SIZE = 4, 96


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(transformers model with the decoded experts, folder with blocks and scales), all else in bfloat16."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    case = tiny_models.CASES["gpt-oss"]
    model = tiny_models.build(case, num_local_experts=EXPERTS, intermediate_size=SIZE)
    folder = tiny_models.save(model, tmp_path_factory.mktemp("gpt-oss"), "bfloat16")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for layer in range(3):
        for name, rows, columns in (("gate_up_proj", 2 * SIZE, 96), ("down_proj", 96, SIZE)):
            at = f"model.layers.{layer}.mlp.experts.{name}"
            shape = (EXPERTS, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
            dense = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            parameter = model.get_parameter(at)
            with torch.no_grad():
                parameter.copy_(dense if dense.shape == parameter.shape else dense.transpose(1, 2))
            del tensors[at]
            tensors |= {f"{at}_blocks": blocks, f"{at}_scales": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return model, folder


@pytest.mark.interop(type="MXFP4 experts of gpt-oss, whole model", direction="read", against="transformers")
def test_experts_are_read_exactly(published):
    model, folder = published
    wanted = tiny_models.weights(model)
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.names()) == set(wanted)
        for name in checkpoint.names():
            np.testing.assert_array_equal(checkpoint.read(name), wanted[name], err_msg=name)
        ids = tiny_models.token_ids(30)
        logits = reference_logits(checkpoint.config, wanted, ids)
    theirs = tiny_models.logits(model, ids)
    np.testing.assert_allclose(logits, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.interop(type="MXFP4 experts of gpt-oss, whole model", direction="read", against="transformers")
def test_experts_run_as_codes(published):
    model, folder = published
    loaded = load_model(folder, activations="int16", kv_bits=16)
    matrix = loaded.weights["model.layers.1.mlp.experts.2.gate_proj.weight"]
    assert [term.kind for term in matrix.terms] == ["codes"]
    assert matrix.bits_per_weight < 4.4  # 4.25 and a table
    ids = tiny_models.token_ids(30)
    cache = loaded.cache()
    ours = loaded.decoder.logits(np.array(ids, np.int32), [cache], [30], all=True)
    rounded = reference_logits(loaded.config, tiny_models.weights(model), ids, kv_dtype=np.float16)
    off = np.abs(ours - rounded).max(axis=1) / np.abs(rounded).max()
    assert np.median(off) < 1e-3 and np.mean(off < 5e-3) > 0.9  # a router's close call may go the other way
    again = loaded.cache()
    rows = [loaded.decoder.logits(np.array([i], np.int32), [again], [1])[0] for i in ids]
    np.testing.assert_array_equal(np.array(rows), ours)
