"""Every symbol, parameter and default of Transformer Engine that is used, against the sources of five versions."""

from __future__ import annotations

import ast

import pytest

from megatron_fp4.numerics.hadamard import SIGNS_16
from megatron_fp4.precision.te.recipe import NOT_FROM_ENVIRONMENT
from megatron_fp4.precision.te.versions import OPTIONAL_SYMBOLS, SYMBOLS, TABLE, detect, parse_version
from tests.precision.te.te_wheels import WHEELS, find, method, parameters, source, tree

VERSIONS = list(WHEELS.items())
STORAGES = {
    "NVFP4TensorStorage": "pytorch.tensor.storage.nvfp4_tensor_storage",
    "MXFP8TensorStorage": "pytorch.tensor.storage.mxfp8_tensor_storage",
    "Float8BlockwiseQTensorStorage": "pytorch.tensor.storage.float8_blockwise_tensor_storage",
}


def known(version: str) -> dict[str, dict[str, str | None]]:
    """Parameters of every symbol that this version has."""
    found = {name: find(version, module, name) for name, module in {**SYMBOLS, **OPTIONAL_SYMBOLS}.items()}
    return {name: parameters(node) for name, node in found.items() if node is not None}


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_the_table_says_what_the_sources_say(short: str, full: str) -> None:
    assert detect(full, known(full)) == TABLE[short], "te_versions.TABLE promises what this version does not have"


def test_every_version_of_the_table_is_checked() -> None:
    assert set(TABLE) == set(WHEELS)


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_quantizers_take_what_is_passed(short: str, full: str) -> None:
    symbols = known(full)
    fp4 = symbols["NVFP4Quantizer"]
    passed = {"rowwise", "columnwise", "with_rht", "with_post_rht_amax", "with_2d_quantization", "stochastic_rounding"}
    passed |= {"with_random_sign_mask"}
    assert passed <= set(fp4), f"TypeError at the first quantization: {passed - set(fp4)}"
    assert (fp4["fp4_dtype"] or "").endswith("DType.kFloat4E2M1"), "the code type is left at its default"
    body = ast.unparse(find(full, SYMBOLS["NVFP4Quantizer"], "NVFP4Quantizer") or ast.Module([], []))
    for name in ("with_amax_reduction", "amax_reduction_group"):
        assert f"self.{name} = {name}" in body, "the group is set as an attribute before each use"
    if TABLE[short].four_over_six:
        assert {"nvfp4_use_4over6", "nvfp4_e4m3_max", "nvfp4_4over6_err_mode"} <= set(fp4)
    if "row_scaled_nvfp4" in fp4:
        assert fp4["row_scaled_nvfp4"] == "False", "row scaling is never asked for"
    for name in ("MXFP8Quantizer", "Float8BlockQuantizer"):
        assert next(iter(symbols[name])) == "fp8_dtype", f"{name}: the type is passed as the first argument"
        assert {"rowwise", "columnwise"} <= set(symbols[name])
    assert {"amax_epsilon", "force_pow_2_scales", "block_scaling_dim"} <= set(symbols["Float8BlockQuantizer"])
    if "with_2d_quantization" in symbols["MXFP8Quantizer"]:
        assert symbols["MXFP8Quantizer"]["with_2d_quantization"] == "False", "1x32 blocks are meant"


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_the_gemm_takes_what_is_passed(short: str, full: str) -> None:
    gemm = known(full)["general_gemm"]
    assert list(gemm)[:2] == ["A", "B"]
    wanted = {"out_dtype", "layout", "grad", "use_split_accumulator", "out", "accumulate"}
    assert wanted <= set(gemm)
    assert (gemm["alpha"], gemm["beta"], gemm["accumulate"]) == ("1.0", "None", "False")
    required = {name for name, default in gemm.items() if default is None} - {"A", "B"}
    assert required == ({"workspace"} if TABLE[short].gemm_workspace else set()), "an argument that is never passed"
    body = source(full, SYMBOLS["general_gemm"])
    assert body is not None
    assert "('TN', 'NN', 'NT')" in ast.unparse(ast.parse(body)), "the three layouts that matmul forms"


@pytest.mark.parametrize(("short", "full"), VERSIONS)
@pytest.mark.parametrize("name", STORAGES)
def test_a_storage_can_be_made_again_from_its_metadata(short: str, full: str, name: str) -> None:
    node = find(full, STORAGES[name], name)
    assert isinstance(node, ast.ClassDef), f"{name} is gone or renamed"
    get = method(node, "get_metadata")
    assert get is not None
    returned = next(item.value for item in ast.walk(get) if isinstance(item, ast.Return))
    assert isinstance(returned, ast.Dict)
    keys = [key.value for key in returned.keys if isinstance(key, ast.Constant)]
    accepted = set(parameters(node))
    assert set(keys) <= accepted, f"storage(**metadata) would raise TypeError for {set(keys) - accepted}"
    assert {key for key in accepted if parameters(node)[key] is None} <= set(keys), "an argument would be missing"
    tensors = {"rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"}
    tensors |= {"amax_rowwise", "amax_columnwise"} if name.startswith("NVFP4") else set()
    assert {key for key in keys if "rowwise" in key or "columnwise" in key} == tensors, (
        "copies are split by these names"
    )


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_internal_quantizers_make_plain_storage(short: str, full: str) -> None:
    for module in ("pytorch.quantized_tensor", "pytorch.tensor.quantized_tensor"):
        node = find(full, module, "Quantizer")
        if isinstance(node, ast.ClassDef):
            init, call = method(node, "__init__"), method(node, "__call__")
            assert init is not None
            assert "self.internal = False" in ast.unparse(init), "`quantizer.internal = True` would have no effect"
            assert call is not None, "quantizer(tensor) is how a tensor is quantized"
            return
    pytest.fail(f"Transformer Engine {full} has no Quantizer base class where it was")


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_the_fixed_signs_are_ours(short: str, full: str) -> None:
    node = find(full, SYMBOLS["NVFP4Quantizer"], "get_wgrad_sign_vector")
    assert node is not None
    lists = [ast.literal_eval(item) for item in ast.walk(node) if isinstance(item, ast.List)]
    assert [tuple(values) for values in lists] == [SIGNS_16], "rht_signs: fixed would mean another vector than TE's"


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_recipes_have_the_fields_that_are_set(short: str, full: str) -> None:
    symbols = known(full)
    fields = {"disable_rht", "disable_stochastic_rounding", "disable_2d_quantization", "fp8_dpa", "fp8_mha"}
    assert fields <= set(symbols["NVFP4BlockScaling"])
    assert "qfactory" in symbols["CustomRecipe"]
    if TABLE[short].role_objects:
        assert set(symbols["QuantizerRole"]) == {"module_type", "tensor_type", "name"}
    else:
        text = source(full, "common.recipe") or ""
        assert "linear_grad_output" in text, "roles are strings in this version"
    if TABLE[short].mixed_directions:
        assert {"rowwise_quantizer", "columnwise_quantizer"} <= set(symbols["HybridQuantizer"])


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_fused_adam_norm_and_loss_take_what_is_passed(short: str, full: str) -> None:
    adam = find(full, "pytorch.optimizers.fused_adam", "FusedAdam")
    assert isinstance(adam, ast.ClassDef)
    assert {"params", "lr", "betas", "eps", "weight_decay", "adam_w_mode"} <= set(parameters(adam))
    norm, operation = (find(full, f"pytorch.{m}.rmsnorm", "RMSNorm") for m in ("module", "ops.basic"))
    assert isinstance(norm, ast.ClassDef)
    assert isinstance(operation, ast.ClassDef)
    assert list(parameters(norm))[:2] == ["normalized_shape", "eps"]
    assert {"device", "dtype"} <= set(parameters(operation)), "what the module hands on as **kwargs"
    assert parameters(norm)["zero_centered_gamma"] == "False", "the weight would be added to 1"
    body = ast.unparse(operation)
    assert "self.weight.device.type == 'meta'" in body, "a weight on the meta device is expected to be replaced later"
    for export in ("RMSNorm", "parallel_cross_entropy"):
        assert f"import {export}\n" in (source(full, "pytorch") or ""), f"transformer_engine.pytorch.{export} is gone"


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_the_cross_entropy_takes_what_is_passed_by_position(short: str, full: str) -> None:
    module = "pytorch.cross_entropy"
    function = find(full, module, "parallel_cross_entropy")
    if function is None:  # 2.9: the `apply` of the autograd function, which takes no keywords
        assert "parallel_cross_entropy = CrossEntropyFunction.apply" in (source(full, module) or "")
        node = find(full, module, "CrossEntropyFunction")
        assert isinstance(node, ast.ClassDef)
        function = method(node, "forward")
    assert isinstance(function, ast.FunctionDef)
    names = [name.strip("_") for name in parameters(function) if name != "ctx"]
    names = ["inp" if name == "input" else name for name in names[:6]]
    assert names == ["inp", "target", "label_smoothing", "reduce_loss", "dist_process_group", "ignore_idx"]


@pytest.mark.parametrize(("short", "full"), VERSIONS)
def test_no_field_of_a_recipe_is_left_to_the_environment(short: str, full: str) -> None:
    """NVTE_BACKWARD_OVERRIDE, NVTE_NVFP4_4OVER6, ... are read when TE is imported, and change what is computed."""
    passed = {"disable_rht", "disable_stochastic_rounding", "disable_2d_quantization", *NOT_FROM_ENVIRONMENT}
    for name in ("NVFP4BlockScaling", "CustomRecipe"):
        left = {field for field, default in known(full)[name].items() if default and "getenv" in default} - passed
        assert not left, f"{name}: {left} would be whatever the environment says"


def test_the_reference_quantizer_takes_what_is_passed() -> None:
    for short, full in VERSIONS:
        if TABLE[short].mixed_directions:  # from 2.19 on, as te_recipe(reference=True) is
            assert {
                "dtype",
                "rowwise",
                "columnwise",
                "quant_tile_shape",
                "with_rht",
                "with_random_sign_mask",
                "nvfp4_use_4over6",
                "nvfp4_e4m3_max",
                "nvfp4_4over6_err_mode",
            } <= set(known(full)["NVFP4QuantizerRef"])
        else:
            assert "NVFP4QuantizerRef" not in known(full), "it would be taken for the one of 2.19"


def test_the_scale_formula_of_the_reference_is_the_one_assumed() -> None:
    """The kernels are not in a wheel; the reference beside them changed together with them."""
    old = tree("2.9.0", "pytorch.experimental.quantization_nvfp4")
    new = tree("2.20.2", "pytorch.custom_recipes.reference_nvfp4")
    assert old is not None
    assert new is not None
    assert "global_encode_scale_multiplier" in ast.unparse(new), "2.14 and later: amax_b * (S_enc * (1/6))"
    assert "global_encode_scale_multiplier" not in ast.unparse(old), "before: amax_b / 6 * S_enc"


@pytest.mark.parametrize("text", ["2.8.0", "1.13", "dev"])
def test_older_versions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"older than 2\.9"):
        parse_version(text)


def test_missing_symbols_are_named() -> None:
    with pytest.raises(ValueError, match="has no NVFP4Quantizer"):
        detect("2.21.0", {name: [] for name in SYMBOLS if name != "NVFP4Quantizer"})
