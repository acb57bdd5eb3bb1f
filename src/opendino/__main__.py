# SPDX-License-Identifier: Apache-2.0
"""`python -m opendino`: the command line where its script is not on the path."""

import sys

from opendino.cli import main

sys.exit(main())
