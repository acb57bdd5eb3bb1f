# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a backbone with labels, measured against a linear probe on the frozen one."""
