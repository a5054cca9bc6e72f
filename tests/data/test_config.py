import pytest
from omegaconf import OmegaConf

from megatron_fp4.data.config import DataConfig, config_from_dict


def test_reads_through_omegaconf():
    """The YAML boundary: nested dataclasses, dict of floats, list of lists."""
    text = """
    sources: [{name: web, paths: [/a, /b]}, {name: code, paths: [/c], max_epochs: 0}]
    phases: [{name: one, tokens: 100, weights: {web: 0.7, code: 0.3}}, {name: two}]
    skip: [[3, 5]]
    evaluation: [{name: held, paths: [/d]}]
    """
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.create(text))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, DataConfig)
    assert config.phases[0].weights == {"web": 0.7, "code": 0.3}
    assert config == config_from_dict(OmegaConf.to_container(merged))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"seq_length": 0}, "seq_length = 0"),
        ({"prefetch_batches": -1}, "prefetch_batches = -1"),
        ({"sources": [{"name": "a"}, {"name": "a"}]}, r"\['a'\] occur more than once"),
        ({"sources": [{"paths": ["x"]}]}, r"sources\[0\] has no name"),
        ({"sources": [{"name": "a", "max_epochs": -1}]}, "max_epochs = -1"),
        ({"phases": [{"name": "a"}, {"name": "b"}]}, "only the last phase may be open"),
        ({"skip": [[5, 5]]}, r"skip has \[5, 5\]"),
        ({"sources": [{"nam": "a"}]}, r"SourceConfig has no \['nam'\]"),
        ({"seqlength": 1}, r"DataConfig has no \['seqlength'\]"),
        ({"evaluation": [{"name": "a", "max_tokens": -1}]}, r"evaluation\[0\].max_tokens = -1"),
        ({"sources": [{"name": "a", "paths": "/a"}]}, "SourceConfig.paths='/a' must be of type list"),
        ({"phases": [{"name": "a", "tokens": "5e6"}]}, "tokens='5e6' must be of type int; YAML reads 5e6 as text"),
        ({"phases": {"name": "a"}}, "DataConfig.phases={'name': 'a'} must be of type list"),
        ({"reset_documents": 1}, "reset_documents=1 must be of type bool"),
        ({"sources": ["/a"]}, "SourceConfig must have the keys .* got '/a'"),
        ([1], "DataConfig must have the keys"),
    ],
)
def test_refusals(value, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(value)
