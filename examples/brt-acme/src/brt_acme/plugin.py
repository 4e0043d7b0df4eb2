"""The module that the entry point names: what acme offers."""

from __future__ import annotations

from collections.abc import Iterator

import brt


@brt.hookimpl
def brt_protocols() -> Iterator[brt.ProtocolSpec]:
    from brt_acme.top_p import TopP

    yield brt.ProtocolSpec.of(TopP)


@brt.hookimpl
def brt_routers() -> Iterator[brt.RouterSpec]:
    from brt_acme.shared_scatter import SharedScatter

    yield brt.RouterSpec.of(SharedScatter, name="acme-shared-scatter")


@brt.hookimpl
def brt_passes() -> Iterator[brt.PassSpec]:
    from brt_acme.drop_identities import DropIdentities

    yield brt.PassSpec.of(DropIdentities)
