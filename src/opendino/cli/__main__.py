# SPDX-License-Identifier: Apache-2.0
"""`python -m opendino.cli`."""

import sys

from opendino.cli import main

sys.exit(main())
