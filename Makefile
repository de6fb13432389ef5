# Every target sets up what it needs on a fresh machine with Python >= 3.11. `make` alone runs what CI runs.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)

.PHONY: all check test demo bench docs gpu arena-arms wheel clean
all: check test wheel

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit("tempering needs Python >= 3.11; this is " + sys.version.split()[0] + \
	". Give another one: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch numpy
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	@rm -f $(VENV)/.ready-*; touch $@

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: $(READY)  ## the tests
	$(BIN)/python -m pytest -n auto

demo: $(READY)  ## a teacher and students on the bundled digits, a table and a report
	$(BIN)/tempering demo

# one whole run of the field's recipe on a CUDA device: teacher and students at full size, images augmented on the device
DATA ?= ../shared/data/cifar100
ARMS ?= supervised,kd,kd-matched,dkd,dtkd-published,dtkd
# the whole arena: make gpu ARMS="$(make -s arena-arms)"
ARENA := $(ARMS),dtkd-max,dtkd-std,entropy,ctkd,cosine,normkd,energy,itkd,dist,ttm,wttm,nkd,lskd,rld,erkd,cskd,r2kd,ats,sp,pkt
SEEDS ?= 3
EPOCHS ?= 240
FULL ?= benchmarks/results/cifar100-resnet32x4-resnet8x4
gpu: $(READY)  ## CIFAR-100 at full size on a CUDA device; resumes; records and table under benchmarks/results/
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu needs a CUDA device \
	and a CUDA build of torch; this is torch " + torch.__version__ + ". Install one: make gpu CONSTRAINTS=/dev/null")'
	$(BIN)/tempering compare recipes/cifar100.py --methods $(ARMS) --seeds $(SEEDS) --out $(FULL) -- --data $(DATA) \
	--teacher resnet32x4 --student resnet8x4 --epochs $(EPOCHS) --precision bf16-mixed --accelerator cuda

docs: $(READY)  ## docs/papers.md, from docstrings, presets and records; docs/performance.md, from what make bench wrote
	$(BIN)/python -m tempering.papersdoc .
	$(BIN)/python benchmarks/page.py

arena-arms:
	@echo $(ARENA)

BENCH ?= step loss fused_linear overhead cache speculative augment startup growth
bench: $(READY)  ## every benchmark, side by side with peers; CSVs under benchmarks/results/speed and docs/performance.md
	@set -e; for name in $(BENCH); do $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/page.py

wheel: $(READY)  ## builds the wheel, installs it into an empty environment, runs it
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	rm -rf build/empty && $(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet -c $(CONSTRAINTS) torch numpy
	build/empty/bin/python -m pip install --quiet -c $(CONSTRAINTS) dist/*.whl
	cd build && empty/bin/tempering --help > /dev/null && empty/bin/tempering list > /dev/null
	rm -rf build/empty

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
