# In the active environment (pip install -e ".[dev]"), but for `test`, which makes one of its own.
.PHONY: style quality docs package test matrix

style: # mends what can be mended
	ruff check --fix .
	ruff format .

quality:
	bash scripts/quality.sh

docs:
	bash scripts/docs.sh

package:
	bash scripts/package.sh

test:
	bash scripts/test.sh

matrix:
	nox -s oldest transformers-4.57
