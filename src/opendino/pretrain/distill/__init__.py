# SPDX-License-Identifier: Apache-2.0
"""Distillation: a small student learns from a frozen larger teacher, by its heads' targets or by its features."""
