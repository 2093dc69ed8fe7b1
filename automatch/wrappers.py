"""Keys without what `torch.compile`, `DataParallel` and `DistributedDataParallel` put into them, so that a layout has one name."""

from __future__ import annotations

from dataclasses import replace

from automatch.mapping import KeyMapping, Side
from automatch.specs import StateSpec

_COMPILED, _PARALLEL = "_orig_mod", "module."


def plain_keys(spec: StateSpec) -> dict[str, str]:
    """For each key of ``spec`` the key without wrappers; the key itself for all where two would be the same."""
    plain = {key: ".".join(word for word in key.split(".") if word != _COMPILED) if _COMPILED in key else key for key in spec.keys}
    if all(key.startswith(_PARALLEL) for key in plain.values()):
        plain = {key: name.removeprefix(_PARALLEL) for key, name in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {key: key for key in spec.keys}


def renamed_spec(spec: StateSpec, names: dict[str, str]) -> StateSpec:
    """``spec`` under other keys."""
    if all(key == name for key, name in names.items()):
        return spec
    tensors = (replace(t, key=names[t.key], alias_of=None if t.alias_of is None else names[t.alias_of]) for t in spec)
    return StateSpec(tuple(tensors), spec.origin, spec.wrapper)


def renamed_mapping(
    mapping: KeyMapping, source: StateSpec, sources: dict[str, str], target: StateSpec, targets: dict[str, str]
) -> KeyMapping:
    """The matches of ``mapping`` under other keys, between the sides that these keys belong to."""
    matches = [replace(m, target=targets[m.target], sources=tuple(sources[key] for key in m.sources)) for m in mapping.matches]
    return replace(mapping, source=Side.of(source), target=Side.of(target), matches=()).with_matches(matches)


def plain_mapping(mapping: KeyMapping) -> KeyMapping:
    """``mapping``, which must hold the specs of both sides, without wrappers in its keys."""
    source, target = mapping.source.spec, mapping.target.spec
    assert source is not None
    assert target is not None
    sources, targets = plain_keys(source), plain_keys(target)
    plain_source, plain_target = renamed_spec(source, sources), renamed_spec(target, targets)
    if plain_source is source and plain_target is target:
        return mapping
    return renamed_mapping(mapping, plain_source, sources, plain_target, targets)
