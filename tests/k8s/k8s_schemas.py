"""What the API server refuses by schema: unknown fields, types, enums, and the CEL rules of custom resources.

The schemas of Kubernetes' own kinds come with kubernetes-validate. Those of KubeRay, Kueue and the Prometheus operator
are their published definitions, which are not ours to ship: `CRDS`, if it is there.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from cel_expr_python import cel

from k8s_rendered import ROOT, Object, name

KUBERNETES = "1.37"
CRDS = ROOT.parent / "shared" / "k8s" / "crds"
OPERATORS = ("ray.io", "kueue.x-k8s.io", "monitoring.coreos.com")


def is_custom(thing: Object) -> bool:
    """Whether its schema is an operator's."""
    return thing["apiVersion"].partition("/")[0] in OPERATORS


def schema_faults(thing: Object) -> list[str]:
    """What the API server would refuse, each with where it is."""
    if not is_custom(thing):
        return _core_faults(thing, name(thing))
    schema = _custom_schema(thing["apiVersion"], thing["kind"])
    if schema is None:
        return [f"{name(thing)}: there is no such kind: {thing['apiVersion']} {thing['kind']}"]
    faults = [_line(name(thing), error) for error in jsonschema.Draft202012Validator(schema).iter_errors(thing)]
    # A definition leaves metadata to Kubernetes, which knows them from its own kinds.
    bare = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": thing["metadata"]}
    return faults + _core_faults(bare, name(thing)) + list(_broken_rules(schema, thing, name(thing)))


def _core_faults(thing: Object, where: str) -> list[str]:
    try:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [_line(where, error)]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{where}: there is no such kind: {error.api_version} {error.kind}"]
    return []


def _line(where: str, error: jsonschema.ValidationError) -> str:
    return f"{where}: {error.json_path.removeprefix('$.')}: {error.message}"


@cache
def _definitions() -> dict[tuple[str, str], Object]:
    """Kind of every definition, and API version -> schema."""
    found = {}
    for file in CRDS.glob("*.yaml"):
        spec = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            if version["served"]:
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = version["schema"]["openAPIV3Schema"]
    return found


@cache
def _custom_schema(api_version: str, kind: str) -> Object | None:
    schema = _definitions().get((api_version, kind))
    return None if schema is None else _strict(schema)


def _strict(schema: Any) -> Any:
    """The same without room for unknown fields; what has a default need not be given."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(each) for key, each in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
        required = [key for key in schema.get("required", []) if "default" not in properties.get(key, {})]
        strict["required"] = required
    return strict


def _broken_rules(schema: Object, value: Any, where: str) -> Iterator[str]:
    """The CEL rules (x-kubernetes-validations) that do not hold for a new object."""
    for each in schema.get("x-kubernetes-validations", []):
        # A rule on what was there before is one for updates.
        if "oldSelf" not in each["rule"] and not _rule(each["rule"]).eval(data={"self": value}).value():
            yield f"{where}: {each.get('message', each['rule'])}"
    if isinstance(value, dict):
        for key, below in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(inner, dict):
                yield from _broken_rules(inner, below, f"{where}.{key}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _broken_rules(schema.get("items", {}), below, f"{where}[{index}]")


@cache
def _rule(text: str) -> Any:
    return cel.NewEnv(variables={"self": cel.Type.DYN}).compile(text)
