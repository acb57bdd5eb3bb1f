# SPDX-License-Identifier: Apache-2.0
"""The model card of a run folder: facts read from its files, and Markdown with front matter made of them."""
