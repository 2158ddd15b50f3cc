"""`python -m edge_rag.learning.trainer FOLDER`: do the job in a folder. See the package's docstring."""

import sys
from pathlib import Path

from edge_rag.learning.trainer.program import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
