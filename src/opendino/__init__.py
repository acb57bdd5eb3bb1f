# SPDX-License-Identifier: Apache-2.0
"""The whole DINOv2 system in one package."""

from opendino._version import __version__

__all__ = ["__version__"]
