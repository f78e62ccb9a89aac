"""What can be tuned for a model: the launches of serving, by the choice that they hang on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halimede.errors import KernelError
from halimede.kernels.launch import Launch, intercepting
from halimede.kernels.spec import Case, KernelSpec
from halimede.kernels.specialise import Specialisation
from halimede.kernels.target import Target
from halimede.kernels.tune_bench import forcing
from halimede.kernels.tuning import KernelConfig, Pick, overriding

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Tunable:
    """A line of a tuned table: all shapes of serving that one choice of a config is for.

    key, size: as the launcher asks pick_config. own: its own choice, without any table; the first of configs.
    """

    spec: KernelSpec
    key: str
    size: int
    cases: tuple[Case, ...]
    own: KernelConfig
    configs: tuple[KernelConfig, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A config that the launcher takes. launches: of every case, as (specialisation, grid)."""

    config: KernelConfig
    launches: tuple[tuple[Specialisation, tuple[int, ...]], ...]

    @property
    def specialisations(self) -> list[Specialisation]:
        """That must be built, each once."""
        return list({one.key: one for one, _ in self.launches}.values())


def find_tunables(launches: Iterable[Launch], target: Target, specs: Iterable[KernelSpec]) -> list[Tunable]:
    """Those of the specs that have a space, in the order in which they were launched."""
    by_kernel = {id(spec.space.kernel): spec for spec in specs if spec.space is not None}
    seen: set[Any] = set()
    groups: dict[tuple[str, str, int], list[tuple[KernelSpec, Launch, Case, KernelConfig]]] = {}
    for launch in launches:
        spec = by_kernel.get(id(launch.kernel))
        facts = _facts(launch)
        if spec is None or 0 in launch.grid or facts in seen:
            continue
        seen.add(facts)
        assert spec.space is not None
        case = spec.space.case(launch)
        pick, again = _picked(spec, case, target)
        group = groups.setdefault((spec.name, pick.key, pick.size), [])
        group.append((spec, again, case, pick.heuristic()))
    return [_tunable(key, size, group, target) for (_, key, size), group in groups.items()]


def _tunable(
    key: str, size: int, group: Sequence[tuple[KernelSpec, Launch, Case, KernelConfig]], target: Target
) -> Tunable:
    spec, _, _, own = group[0]
    assert spec.space is not None
    tried = [config for _, launch, _, _ in group for config in spec.space.configs(target, launch)]
    configs = {config_id(config): config for config in (own, *tried)}
    cases = {case.name: case for _, _, case, _ in group}
    return Tunable(spec, key, size, tuple(cases.values()), own, tuple(configs.values()))


def config_id(config: KernelConfig) -> str:
    """The same for configs that are equal, as people read it."""
    parts = {**config.blocks, **config.options, "warps": config.num_warps, "stages": config.num_stages}
    return " ".join(f"{name}={parts[name]}" for name in sorted(parts))


def plan(tunable: Tunable, config: KernelConfig, target: Target) -> Candidate:
    """What the launcher would start with a config, found on the meta device. KernelError if it refuses."""
    launches: list[tuple[Specialisation, tuple[int, ...]]] = []

    def note(launch: Launch) -> None:
        launches.append((launch.specialise(target), launch.grid))

    with forcing(tunable.spec, config, target, note), torch.device("meta"):
        for case in tunable.cases:
            tunable.spec.launcher(**case.make(_META))
    return Candidate(config, tuple(launches))


def _picked(spec: KernelSpec, case: Case, target: Target) -> tuple[Pick, Launch]:
    """What the launcher asks pick_config for, and what it then starts, with its own choice."""
    assert spec.space is not None
    picks: list[Pick] = []
    launches: list[Launch] = []

    def choose(pick: Pick) -> KernelConfig | None:
        if pick.kernel != spec.name:
            return None
        picks.append(pick)
        return pick.heuristic()

    with overriding(target, choose) as own, intercepting(own, launches.append), torch.device("meta"):
        spec.launcher(**case.make(_META))
    launches = [launch for launch in launches if launch.kernel is spec.space.kernel]
    assert picks, f"{spec.name} has a space, but its launcher asks for no config of that name"
    assert launches, f"{spec.name} has a space, but its case {case.name} does not start its kernel"
    return picks[0], launches[0]


def _facts(launch: Launch) -> tuple[Any, ...]:
    """That tell one shape from another: the sizes that a launch was asked for."""
    args = [
        (arg.dtype, tuple(arg.shape), arg.stride()) if isinstance(arg, torch.Tensor) else arg
        for arg in launch.args
    ]
    return (id(launch.kernel), launch.grid, *args, *sorted(map(repr, launch.constants.items())))


def tunable_specs(specs: Mapping[str, KernelSpec], names: Sequence[str]) -> list[KernelSpec]:
    """Those that have a space, of `names` if there are any. KernelError for a name that has none."""
    known = {name: spec for name, spec in specs.items() if spec.space is not None}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise KernelError(f"{', '.join(unknown)} cannot be tuned; use some of: {', '.join(known) or 'none'}")
    return [known[name] for name in names] if names else list(known.values())
