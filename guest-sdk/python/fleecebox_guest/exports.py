"""Which provider the component is of."""

from .provider import BlindProvider, Provider

_exported = []


def export(provider: type[Provider]) -> type[Provider]:
    """Makes a component of a `Provider`. Once per program; may be used as a decorator."""
    if not hasattr(provider, "Image"):
        raise TypeError(f"{provider.__name__} has no class `Image`, which gives back what it claims")
    return _export(provider, Provider)


def export_blind(provider: type[BlindProvider]) -> type[BlindProvider]:
    """Makes a component of a `BlindProvider`. Once per program; may be used as a decorator."""
    return _export(provider, BlindProvider)


def exported() -> type:
    """The provider that the program exports."""
    return _exported[0]


def _export(provider, kind):
    if not issubclass(provider, kind):
        raise TypeError(f"{provider.__name__} is no {kind.__name__}")
    if _exported:
        raise TypeError(f"{_exported[0].__name__} is exported already; a component is one provider")
    _exported.append(provider)
    return provider
