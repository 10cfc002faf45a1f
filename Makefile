# What a person types in a checkout. Each target makes its own virtual environment in .venv where that is not done yet.

.DEFAULT_GOAL := help
.PHONY: bench fuzz nnsmith fuzz-hostile help demo test lint format types conformance sanitize readme clean
.DELETE_ON_ERROR:

VENV := .venv
RUN := $(VENV)/bin/python
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(name))))
PACKAGE := __init__.py __main__.py py.typed backends compiler ir passes tools

# An environment that does not run is made anew; one that was installed in another folder is installed again.
ifneq ($(shell $(RUN) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null),True)
$(VENV)/pyvenv.cfg: outdated
endif
ifneq ($(shell cat $(VENV)/folder 2>/dev/null),$(CURDIR))
$(VENV)/installed $(VENV)/installed-test: outdated
endif

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/installed ## compile a small trained model and run it on handwritten digits
	@$(RUN) -m onnxc demo

test: lint types ## everything that is checked: lint, format, types, and all tests
	@$(RUN) -m pytest tests -n auto -q

lint: $(VENV)/installed-test ## ruff: rules and format
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: $(VENV)/installed-test ## put every file into ruff's format
	@$(RUN) -m ruff check --fix-only .
	@$(RUN) -m ruff format .

# mypy does not follow an editable install: it is shown the package by links, whatever the checkout's folder is called.
types: $(VENV)/installed-test ## mypy --strict
	@rm -rf build/types && mkdir -p build/types/onnxc
	@for part in $(PACKAGE); do ln -s ../../../$$part build/types/onnxc/$$part; done
	@MYPYPATH=build/types $(RUN) -m mypy --strict -p onnxc

conformance: $(VENV)/installed-test ## ONNX's own test suite alone, for CPUs and GPUs; its table in README.md
	@ONNXC_CUDA_CASES=all $(RUN) -m pytest tests/conformance -n auto -q --record tests/conformance/record.json
	@$(RUN) -m onnxc.tools.conformance_table README.md tests/conformance/record.json

sanitize: $(VENV)/installed-test ## ONNX's suite and the models with kernels that check each access to memory
	@ONNXC_CHECKED_CASES=all $(RUN) -m pytest tests/conformance/test_onnx_checked.py -n auto -q
	@ONNXC_CHECK_BOUNDS=1 $(RUN) -m pytest tests/models/test_models.py -n auto -q

fuzz: fuzz-hostile ## 10,000 mutants, then random graphs until stopped (or FUZZ_SECONDS); failures go to tests/fuzz/found
	@cd tests && ../$(RUN) -W ignore -m fuzz.loop $(FUZZ_SECONDS)

NNSMITH_COUNT := 1000
nnsmith: $(VENV)/installed-test ## NNSMITH_COUNT models drawn by nnsmith in an environment of its own, compiled and compared
	@test -x build/nnsmith/venv/bin/python || $(PYTHON) -m venv build/nnsmith/venv
	@build/nnsmith/venv/bin/python -m pip install -q --disable-pip-version-check nnsmith==0.1.0 torch==2.13.0 onnx onnxscript
	@build/nnsmith/venv/bin/python tests/fuzz/nnsmith_models.py build/nnsmith/models $(NNSMITH_COUNT)
	@cd tests && ../$(RUN) -W ignore -m fuzz.nnsmith_check ../build/nnsmith/models

fuzz-hostile: $(VENV)/installed-test ## 10,000 mutants of models: each refused, or run correctly
	@$(RUN) tests/fuzz/hostile.py --count 8000
	@$(RUN) tests/fuzz/hostile.py --seed 8000 --count 2000 --checked

bench: $(VENV)/installed-test ## times of all models of `onnxc bench --list` beside other engines, into README.md (an hour)
	@$(RUN) -m pip install -q --disable-pip-version-check -e '.[bench]'
	@$(RUN) -m onnxc.tools.bench.table README.md

readme: $(VENV)/installed-test ## write the tables of README.md anew
	@$(RUN) -m onnxc.tools.operator_table README.md
	@$(RUN) -m onnxc.tools.gpu.table README.md

clean: ## remove what was built and installed
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/.pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: outdated
outdated:

$(VENV)/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "onnxc needs Python 3.11 or newer; found: $$(python3 --version 2>&1)." \
		"Install one, or name it: make PYTHON=/path/to/python3.13 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments:" \
		"install its venv package (on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)

INSTALL := $(RUN) -m pip install -q --disable-pip-version-check

$(VENV)/installed: $(VENV)/pyvenv.cfg pyproject.toml
	@echo "installing onnxc"
	@$(INSTALL) -e .
	@echo '$(CURDIR)' > $(VENV)/folder
	@touch $@

$(VENV)/installed-test: $(VENV)/pyvenv.cfg pyproject.toml
	@echo "installing onnxc and what its tests need"
	@$(INSTALL) -e '.[test]'
	@$(RUN) -m onnxc.tools.install_pycuda && $(INSTALL) 'nvidia-cuda-nvdisasm==13.2.*' || \
		echo "without these, tests of the CUDA backend are skipped"
	@echo '$(CURDIR)' > $(VENV)/folder
	@touch $@ $(VENV)/installed
