#!/usr/bin/env bash
# Install Lamina from this checkout into an environment of its own: deploy/install.sh TARGET [PYTHON]
# The container file runs this, and so does an administrator before using the units. Where the package index offers
# torch with CUDA only, PIP_EXTRA_INDEX_URL can name one with builds for CPUs; see docs/install.md.
set -euo pipefail

source=$(cd "$(dirname "$0")/.." && pwd)
target=${1:?"deploy/install.sh: name the folder to install into, such as /opt/lamina"}
python=${2:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lamina needs Python >= 3.11, this is " + sys.version)'
if [ -e "$target/bin/python" ]; then
    echo "deploy/install.sh: updating $target"
else
    echo "deploy/install.sh: making $target"
    "$python" -m venv "$target"
fi
echo "deploy/install.sh: installing torch and the other packages, a minute or more"
"$target/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$source/constraints.txt" "$source"
"$target/bin/python" -c 'import lamina; print("deploy/install.sh: installed lamina", lamina.__version__)'
