# SPDX-License-Identifier: Apache-2.0
"""Heads on frozen features, in scikit-learn's manners: fit, predict, save, load."""
