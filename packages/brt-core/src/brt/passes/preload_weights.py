"""preload-weights: models larger than the memory given; weights are loaded ahead of their use.

Legend: P paths, Q paths of the next scatter.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from brt.cells import Cells
from brt.errors import PassError
from brt.grouped import each
from brt.guard import Guard, Guarded, Spill
from brt.memory_layout import Layout, home_of, is_at_home
from brt.memory_pool import Group, Pool, Traffic
from brt.passes.base import Context, Pass
from brt.passes.branch import Branch
from brt.passes.match import Chain, Scatter, argument, chains, module_of, scatters
from brt.passes.verify import training
from brt.route import Route
from brt.routers import ScatterRouter

Mode = Literal["on-demand", "predicted"]


@dataclass(frozen=True)
class PreloadWeights(Pass):
    """Load the weights of a branch when cells take it, or before, within a budget of memory.

    `brt.memory.pin` says where weights live: in a mapped file, or in page-locked memory of the
    host. This pass keeps those of some branches in memory of the device that rows are on; what the
    profile shows to be needed least makes room. "predicted" also loads what cells that took the
    paths they took will take at the next scatter, by the profile's joint statistics, while the
    branches before it run. A branch whose weights are not there waits for them.

    Args:
        budget_bytes: of the device's memory, for the weights of a region's branches. A group of
            weights, which is loaded at once, is what one path needs.
        mode: "predicted" or "on-demand".
        likely: the probability from which on weights are loaded ahead.
    """

    name: ClassVar[str] = "preload-weights"

    budget_bytes: int = 1 << 30
    mode: Mode = "predicted"
    likely: float = 0.3

    def __post_init__(self) -> None:
        """Check the options."""
        if self.budget_bytes < 1 or not 0 < self.likely <= 1 or self.mode not in get_args(Mode):
            raise PassError(
                "preload-weights: budget_bytes must be at least 1, likely above 0 and at most 1, "
                f"and mode one of {get_args(Mode)}; got {self.budget_bytes}, {self.likely}, "
                f"{self.mode!r}"
            )

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """An inference region with pinned weights; a profile, where it predicts."""
        name = training(ctx.scope)
        if name is not None:
            raise PassError(
                f"{name} is in training mode, where weights must stay for the backward; call "
                "model.eval() first"
            )
        if not any(is_at_home(t) for t in (*ctx.scope.parameters(), *ctx.scope.buffers())):
            raise PassError(
                "its weights are in memory already; brt.memory.pin(module, path) takes them out"
            )
        if self.mode == "predicted" and ctx.profile is None:
            raise PassError("it predicts by a profile; give one, or take mode='on-demand'")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Let branches run with weights that are lent to them, and scatters say what is next."""
        _unroll(graph, ctx)
        chain_of = chains(graph.graph, ctx.scope)
        shelf = Shelf(self.budget_bytes)
        announcers: list[tuple[Scatter, dict[int, Preloaded]]] = []
        moved: set[fx.Node] = set()
        for scatter in scatters(graph.graph, ctx.scope):
            if scatter.node in moved or scatter.guarded or scatter.router.result != "paths":
                continue
            if type(scatter.router).forward is not ScatterRouter.forward:
                ctx.leave(scatter.name, f"{type(scatter.router).__name__} has a forward of its own")
                continue
            branches = {}
            for path in range(scatter.router.num_paths):
                found = _take(graph, ctx, scatter, path, chain_of, shelf)
                if found is not None:
                    branches[path], inside = found
                    moved |= inside
            if branches:
                announcers.append((scatter, branches))
        _announce(graph, ctx, announcers, shelf, self)
        return bool(announcers)

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """The same operators run, on weights that may be aligned otherwise."""
        return super().tolerance(dtype)


def _unroll(graph: fx.GraphModule, ctx: Context) -> None:
    """Let each branch of a `brt.each` whose weights have a home be a call of its own."""
    for node in [n for n in graph.graph.nodes if n.target is each]:
        modules, paths = node.args
        names = [str(module.target) for module in modules]
        weights = [t for name in names for t in ctx.scope.get_submodule(name).parameters()]
        if not any(map(is_at_home, weights)):
            continue
        if not all(_is_one_flow(path, ctx.scope) for path in paths):
            ctx.leave(node.name, "brt.each runs it on several flows")
            continue
        with graph.graph.inserting_before(node):
            made = [
                graph.graph.call_module(name, (path,))
                for name, path in zip(names, paths, strict=True)
            ]
        for user in list(node.users):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                user.replace_all_uses_with(made[user.args[1]])
                graph.graph.erase_node(user)
            else:
                user.args = tuple(made if given is node else given for given in user.args)
        graph.graph.erase_node(node)


def _is_one_flow(path: Any, scope: nn.Module) -> bool:
    """Whether a node is known to be a tensor: one path of a scatter of one flow."""
    if not isinstance(path, fx.Node) or not path.all_input_nodes:
        return False
    rows = path.all_input_nodes[0]
    scatter = rows.all_input_nodes[0] if rows.all_input_nodes else rows
    if not isinstance(module_of(scatter, scope), ScatterRouter):
        return False
    return isinstance(argument(scatter, 0, "x"), fx.Node)


def _take(
    graph: fx.GraphModule,
    ctx: Context,
    scatter: Scatter,
    path: int,
    chain_of: dict[fx.Node, Chain],
    shelf: Shelf,
) -> tuple[Preloaded, set[fx.Node]] | None:
    """Move one branch, where there is one with weights to load; (its module, its nodes)."""
    start, what = scatter.path_P[path], f"path {path} of {scatter.name}"
    if start is None:
        return None
    branch = Branch(ctx.scope, scatter, path, start, chain_of, {})
    if not any(_has_weights(node, ctx.scope) for node in branch.inside):
        return None
    targets = dict.fromkeys(str(node.target) for node in branch.inside if node.op == "call_module")
    seen = ctx.seen(scatter)
    share = 0.0 if seen is None else float(seen.share_P[path])
    group = Group(what, ctx.scope, tuple(targets), share)
    why_not = branch.unmovable() or _unfit(branch, group, ctx.scope)
    if why_not is not None:
        ctx.leave(what, why_not)
        return None
    size = Layout.of(group.sources()).num_bytes
    if size > shelf.budget_bytes:
        ctx.leave(what, f"its {size} bytes are more than the budget of {shelf.budget_bytes}")
        return None
    guard = ctx.guard(f"{scatter.name}[{path}]", "its weights are there when cells take it")
    module = Preloaded(guard, ctx.scope, branch.graph(), shelf, group)
    chain_of[branch.move(graph, ctx, module, "brt_preloaded")] = chain_of[start]
    shelf.groups.append(group)
    return module, set(branch.inside)


def _has_weights(node: fx.Node, scope: nn.Module) -> bool:
    module = module_of(node, scope)
    return module is not None and any(t.numel() for t in (*module.parameters(), *module.buffers()))


def _unfit(branch: Branch, group: Group, scope: nn.Module) -> str | None:
    """Why weights of a branch cannot be lent to it; None where they can."""
    for node in branch.inside:
        module = module_of(node, scope)
        if isinstance(module, Guarded):
            return f"another pass put {node.target} into it"
        inside = () if module is None else module.modules()
        if any(isinstance(inner, nn.RNNBase) for inner in inside):
            return f"{node.target} keeps its weights in a list of its own"
    if any(node.op == "get_attr" for node in branch.inputs()):
        return "it reads a weight by its name"
    if not all(map(is_at_home, group.sources())):
        return "its weights are in memory already; brt.memory.pin(module, path) takes them out"
    if len({id(home_of(source)) for source in group.sources()}) > 1:
        return "its weights are in several places; pin what it needs by one brt.memory.pin"
    return None


def _announce(
    graph: fx.GraphModule,
    ctx: Context,
    found: list[tuple[Scatter, dict[int, Preloaded]]],
    shelf: Shelf,
    options: PreloadWeights,
) -> None:
    """Put a module in the place of each scatter that says which weights are needed."""
    for at, (scatter, branches) in enumerate(found):
        following, then = found[(at + 1) % len(found)]
        outlook = None
        if options.mode == "predicted":
            chance_PQ = _chances(ctx, scatter, following, at + 1 < len(found))
            if chance_PQ is None:
                ctx.leave(
                    scatter.name, f"the profile does not tell what {following.name} does then"
                )
            else:
                outlook = Outlook(chance_PQ, {q: m.group for q, m in then.items()}, options.likely)
        module = Announcing(ctx.scope, scatter.target, branches, shelf, outlook)
        scatter.node.target = ctx.insert(graph, module, "brt_announcing")
        size = max(Layout.of(m.group.sources()).num_bytes for m in branches.values())
        ahead = "" if outlook is None else f"; loads ahead for {following.name}"
        ctx.note(
            f"{scatter.name}: {len(branches)} paths, {size} bytes at most each, of "
            f"{shelf.budget_bytes}{ahead}"
        )


def _chances(
    ctx: Context, scatter: Scatter, following: Scatter, same_call: bool
) -> tuple[tuple[float, ...], ...] | None:
    """For a cell on path p: the probability of each path q at the next scatter."""
    assert ctx.profile is not None
    seen = ctx.seen(following)
    if seen is None:
        return None
    share_Q = seen.share_P
    keys = f"{scatter.target}#{scatter.call}", f"{following.target}#{following.call}"
    joint_PQ = ctx.profile.joint.get(keys) if same_call else None
    if joint_PQ is None:
        if same_call:
            why = "they share no root (cells=), so only the loads of its paths tell what is next"
            ctx.leave(f"{scatter.name} and {following.name}", why)
        chance_PQ = share_Q.expand(scatter.router.num_paths, -1)
    else:
        of_path_P1 = joint_PQ.sum(1, keepdim=True)
        chance_PQ = torch.where(of_path_P1 > 0, joint_PQ / of_path_P1.clamp(min=1), share_Q)
    return tuple(map(tuple, chance_PQ.tolist()))


@dataclass(frozen=True)
class Outlook:
    """What the profile says about the scatter behind another.

    Attributes:
        chance_PQ: the probability that a cell which took path p takes path q there.
        groups: the weights of its paths q.
        likely: from which probability on they are loaded ahead.
    """

    chance_PQ: tuple[tuple[float, ...], ...]
    groups: dict[int, Group]
    likely: float

    def soon(self, load_P: Sequence[int]) -> list[Group]:
        """What is likely to be needed there by any of these cells, the likeliest first."""
        taken = [
            (chance_Q, load) for chance_Q, load in zip(self.chance_PQ, load_P, strict=True) if load
        ]
        found = []
        for q, group in self.groups.items():
            nobody = 1.0
            for chance_Q, load in taken:
                nobody *= (1.0 - min(chance_Q[q], 1.0)) ** load
            if 1.0 - nobody >= self.likely:
                found.append((nobody, q, group))
        return [group for *_, group in sorted(found, key=lambda one: one[:2])]


class Shelf:
    """The weights of a region's branches, and the memory of each device that they are lent from."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.groups: list[Group] = []
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[torch.device, Pool] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shelf:
        """One for the copied groups, with memory of its own."""
        twin = memo[id(self)] = Shelf(self.budget_bytes)
        twin.groups = copy.deepcopy(self.groups, memo)
        return twin

    def pool(self, group: Group, device: torch.device) -> Pool | None:
        """Where a group can be had on a device; None where its weights are usable as they are."""
        pool = self._pools.get(device)
        if pool is not None and pool.knows(group):
            return pool
        with self._lock:
            self._pools.pop(device, None)
            sources = [source for one in self.groups for source in one.sources()]
            if not all(map(is_at_home, sources)):
                return None
            home = home_of(sources[0])
            if device.type == "cpu" and (home is None or home.file is None):
                return None  # page-locked memory is memory of the CPU
            made = self._pools[device] = Pool(self.groups, self.budget_bytes, device)
            return made

    @property
    def traffic(self) -> dict[str, Traffic]:
        """What was loaded so far, by device."""
        return {str(device): pool.traffic for device, pool in self._pools.items()}

    @property
    def resident_bytes(self) -> dict[str, int]:
        """What the weights that are lent take of each device's memory."""
        return {str(device): pool.num_bytes for device, pool in self._pools.items()}


class Preloaded(Spill):
    """A branch that runs with weights that are lent to it; without rows it needs none."""

    def __init__(
        self, guard: Guard, scope: nn.Module, branch: fx.Graph, shelf: Shelf, group: Group
    ) -> None:
        super().__init__(guard, scope, branch)
        self.shelf, self.group = shelf, group

    def forward(self, rows: Any, *others: Any) -> Any:
        """The result of the branch."""
        first, inputs = rows[0] if isinstance(rows, tuple) else rows, (rows, *others)
        pool = None
        if not torch.compiler.is_compiling() and not self._needs_gradients(inputs):
            pool = self.shelf.pool(self.group, first.device)
        if pool is None:
            return self._branch.run(self.scope, *inputs)
        if not first.shape[0] and not torch.is_grad_enabled():
            return self._branch.nothing(_Blank(pool, self.group), *inputs)
        with pool.lend(self.group) as stand_in:
            return self._branch.run(stand_in, *inputs)

    def _needs_gradients(self, inputs: tuple[Any, ...]) -> bool:
        """Whether what is lent would have to stay for a backward."""
        if not torch.is_grad_enabled():
            return False
        leaves = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
        sources = self.group.sources()
        if not any(t.requires_grad for t in (*sources, *leaves)):
            return False
        if any(source.device != leaves[0].device for source in sources):
            raise PassError(
                f"{self.guard.name}: weights that are lent have no gradients; call the model under "
                "torch.no_grad(), or brt.memory.load(model, device) first"
            )
        return True


class _Blank(nn.Module):
    """Weights of any values, made when they are asked for: what runs with them has no rows."""

    def __init__(self, pool: Pool, group: Group) -> None:
        super().__init__()
        self._made = lambda: pool.blank(group)

    def __getattr__(self, name: str) -> Any:
        if "made" not in self.__dict__:
            self.__dict__["made"] = self.__dict__["_made"]()
        return getattr(self.__dict__["made"], name)


class Announcing(nn.Module):
    """A scatter that says which weights its paths need, and which the next one's may need."""

    def __init__(
        self,
        scope: nn.Module,
        router_target: str,
        branches: dict[int, Preloaded],
        shelf: Shelf,
        outlook: Outlook | None,
    ) -> None:
        super().__init__()
        self.router_target = router_target
        self._scope = (scope,)
        self.shelf, self.outlook = shelf, outlook
        self._paths = tuple((p, m.group, m.guard) for p, m in branches.items())

    @property
    def router(self) -> ScatterRouter:
        """The scatter that decides."""
        return attrgetter(self.router_target)(self._scope[0])

    def forward(
        self, x: Tensor | tuple[Tensor, ...], scores: Tensor, cells: Cells | None = None
    ) -> tuple[Any, Route]:
        """What the scatter returns."""
        paths, route = self.router(x, scores, cells)
        if torch.compiler.is_compiling() or route.sizes is None:
            return paths, route
        taken = [(group, guard) for p, group, guard in self._paths if route.sizes[p]]
        pool = self.shelf.pool(self._paths[0][1], scores.device)
        if pool is not None:
            soon = [] if self.outlook is None else self.outlook.soon(route.sizes)
            there = pool.announce([group for group, _ in taken], soon)
            for (_, guard), held in zip(taken, there, strict=True):
                guard.count(held)
        return paths, route

    def extra_repr(self) -> str:
        """The router that is asked."""
        return f"decides by {self.router_target}"
