"""`from weightsmith import Client`: the Python client of the service."""

from app.client import *  # noqa: F403
from app.client import __all__ as __all__
