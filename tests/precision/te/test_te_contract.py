"""Every symbol, parameter and default of Transformer Engine that is used, against the sources of five versions."""

from __future__ import annotations

import ast

import pytest

from megatron_fp4.numerics.hadamard import SIGNS_16
from megatron_fp4.precision.operand import ScaleOrder
from megatron_fp4.precision.te.recipe import NOT_FROM_ENVIRONMENT
from megatron_fp4.precision.te.versions import FOUR_OVER_SIX_PASSED, MODULES, SYMBOLS, features_of, number_of
from tests.precision.te.te_wheels import WHEELS, find, method, parameters, source, tree

VERSIONS = pytest.mark.parametrize("version", WHEELS)
STORAGES = {
    "NVFP4TensorStorage": "pytorch.tensor.storage.nvfp4_tensor_storage",
    "MXFP8TensorStorage": "pytorch.tensor.storage.mxfp8_tensor_storage",
    "Float8BlockwiseQTensorStorage": "pytorch.tensor.storage.float8_blockwise_tensor_storage",
}


def known(version: str) -> dict[str, dict[str, str | None]]:
    """Parameters of every symbol that this version has."""
    nodes = {name: find(version, symbol.module, name) for name, symbol in SYMBOLS.items()}
    return {name: parameters(node) for name, node in nodes.items() if node is not None}


@VERSIONS
def test_symbols_are_there_from_the_version_that_is_said_on(version: str) -> None:
    expected = {name for name, symbol in SYMBOLS.items() if number_of(version) >= symbol.since}
    assert set(known(version)) == expected, "versions.SYMBOLS promises what this version does not have, or too little"


@VERSIONS
def test_symbols_take_what_is_passed(version: str) -> None:
    for name, taken in known(version).items():
        assert set(SYMBOLS[name].passed) <= set(taken), f"TypeError at the first call of {name}"
    features = features_of(version)
    for name in ("NVFP4Quantizer", "NVFP4QuantizerRef"):
        if name in known(version):
            assert (set(FOUR_OVER_SIX_PASSED) <= set(known(version)[name])) is features.four_over_six


@VERSIONS
def test_quantizers_are_as_they_are_used(version: str) -> None:
    symbols = known(version)
    fp4 = symbols["NVFP4Quantizer"]
    assert (fp4["fp4_dtype"] or "").endswith("DType.kFloat4E2M1"), "the code type is left at its default"
    body = ast.unparse(find(version, SYMBOLS["NVFP4Quantizer"].module, "NVFP4Quantizer") or ast.Module([], []))
    for name in ("with_amax_reduction", "amax_reduction_group"):
        assert f"self.{name} = {name}" in body, "the group is set as an attribute before each use"
    if "row_scaled_nvfp4" in fp4:
        assert fp4["row_scaled_nvfp4"] == "False", "row scaling is never asked for"
    for name in ("MXFP8Quantizer", "Float8BlockQuantizer"):
        assert next(iter(symbols[name])) == "fp8_dtype", f"{name}: the type is passed as the first argument"
    if "with_2d_quantization" in symbols["MXFP8Quantizer"]:
        assert symbols["MXFP8Quantizer"]["with_2d_quantization"] == "False", "1x32 blocks are meant"


@VERSIONS
def test_the_gemm_is_as_it_is_used(version: str) -> None:
    gemm = known(version)["general_gemm"]
    assert list(gemm)[:2] == ["A", "B"]
    assert (gemm["alpha"], gemm["beta"], gemm["accumulate"]) == ("1.0", "None", "False")
    required = {name for name, default in gemm.items() if default is None} - {"A", "B"}
    assert not required, "an argument that is never passed"
    body = source(version, SYMBOLS["general_gemm"].module)
    assert body is not None
    assert "('TN', 'NN', 'NT')" in ast.unparse(ast.parse(body)), "the three layouts that matmul forms"


@VERSIONS
@pytest.mark.parametrize("name", STORAGES)
def test_a_storage_can_be_made_again_from_its_metadata(version: str, name: str) -> None:
    node = find(version, STORAGES[name], name)
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


@VERSIONS
def test_internal_quantizers_make_plain_storage(version: str) -> None:
    for module in ("pytorch.quantized_tensor", "pytorch.tensor.quantized_tensor"):
        node = find(version, module, "Quantizer")
        if isinstance(node, ast.ClassDef):
            init, call = method(node, "__init__"), method(node, "__call__")
            assert init is not None
            assert "self.internal = False" in ast.unparse(init), "`quantizer.internal = True` would have no effect"
            assert call is not None, "quantizer(tensor) is how a tensor is quantized"
            return
    pytest.fail(f"Transformer Engine {version} has no Quantizer base class where it was")


@VERSIONS
def test_the_fixed_signs_are_ours(version: str) -> None:
    node = find(version, SYMBOLS["NVFP4Quantizer"].module, "get_wgrad_sign_vector")
    assert node is not None
    lists = [ast.literal_eval(item) for item in ast.walk(node) if isinstance(item, ast.List)]
    assert [tuple(values) for values in lists] == [SIGNS_16], "rht_signs: fixed would mean another vector than TE's"


@VERSIONS
def test_recipes_have_the_fields_that_are_set(version: str) -> None:
    symbols = known(version)
    assert {"fp8_dpa", "fp8_mha"} <= set(symbols["NVFP4BlockScaling"])
    if features_of(version).mixed_directions:
        role = find(version, "pytorch.quantization", "QuantizerRole")
        assert role is not None, "a factory is called with something else"
        assert {"tensor_type", "name"} <= set(parameters(role))


@VERSIONS
def test_fused_adam_norm_and_loss_take_what_is_passed(version: str) -> None:
    adam = find(version, "pytorch.optimizers.fused_adam", "FusedAdam")
    assert isinstance(adam, ast.ClassDef)
    assert {"params", "lr", "betas", "eps", "weight_decay", "adam_w_mode"} <= set(parameters(adam))
    norm, operation = (find(version, f"pytorch.{m}.rmsnorm", "RMSNorm") for m in ("module", "ops.basic"))
    assert isinstance(norm, ast.ClassDef)
    assert isinstance(operation, ast.ClassDef)
    assert list(parameters(norm))[:2] == ["normalized_shape", "eps"]
    assert {"device", "dtype"} <= set(parameters(operation)), "what the module hands on as **kwargs"
    assert parameters(norm)["zero_centered_gamma"] == "False", "the weight would be added to 1"
    body = ast.unparse(operation)
    assert "self.weight.device.type == 'meta'" in body, "a weight on the meta device is expected to be replaced later"
    for export in ("RMSNorm", "parallel_cross_entropy"):
        assert f"import {export}\n" in (source(version, "pytorch") or ""), (
            f"transformer_engine.pytorch.{export} is gone"
        )


@VERSIONS
def test_the_cross_entropy_takes_what_is_passed_by_position(version: str) -> None:
    function = find(version, "pytorch.cross_entropy", "parallel_cross_entropy")
    assert isinstance(function, ast.FunctionDef)
    names = list(parameters(function))[:6]
    assert names == ["inp", "target", "label_smoothing", "reduce_loss", "dist_process_group", "ignore_idx"]


@VERSIONS
def test_no_field_of_a_recipe_is_left_to_the_environment(version: str) -> None:
    """NVTE_BACKWARD_OVERRIDE, NVTE_NVFP4_4OVER6, ... are read when TE is imported, and change what is computed."""
    passed = {"disable_rht", "disable_stochastic_rounding", "disable_2d_quantization", *NOT_FROM_ENVIRONMENT}
    for name in ("NVFP4BlockScaling", "CustomRecipe"):
        left = {field for field, default in known(version)[name].items() if default and "getenv" in default} - passed
        assert not left, f"{name}: {left} would be whatever the environment says"


def test_the_order_of_the_scales_is_that_of_the_version() -> None:
    """The kernels are not in a wheel; the reference beside them changed together with them."""
    places = ("reference_nvfp4", "quantization_ref_nvfp4", "quantization_nvfp4")
    for version in WHEELS:
        reference = next(node for place in places if (node := tree(version, f"pytorch.custom_recipes.{place}")))
        te = "global_encode_scale_multiplier" in ast.unparse(reference)  # amax_b * (S_enc * (1/6))
        assert features_of(version).scale_order is (ScaleOrder.te if te else ScaleOrder.paper), version


@pytest.mark.parametrize("text", ["2.9.0", "1.13", "dev"])
def test_older_versions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"older than 2\.10"):
        number_of(text)


def test_a_newer_version_does_what_the_newest_known_one_does() -> None:
    assert features_of("2.31.0.dev0") == features_of(WHEELS[-1])
    assert number_of(WHEELS[-1]) > MODULES
