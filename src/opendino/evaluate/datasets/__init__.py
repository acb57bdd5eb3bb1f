# SPDX-License-Identifier: Apache-2.0
"""Data sets as they lie on disk, for the evaluation protocols."""
