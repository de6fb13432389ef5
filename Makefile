# Every target sets up what it needs on a fresh machine with Python >= 3.11. `make` alone runs what CI runs.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)

.PHONY: all check test demo bench conformance docs pages oldest gpu gpu-self-test gpu-cifar100 gpu-detection gpu-language all-methods wheel clean
.PHONY: arena16 arena16-pilot arena16-runs
.PHONY: evidence evidence-teachers evidence-screen evidence-full evidence-ablations evidence-others evidence-resnet20 evidence-short
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
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

test: $(READY)  ## the tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto

demo: $(READY)  ## a teacher and students on the bundled digits, a table and a report
	$(BIN)/python -m tempering demo

# whole runs on a CUDA device, each also by itself; what was stopped goes on, and what is done stays
gpu: gpu-self-test gpu-cifar100 gpu-detection gpu-language  ## the tables at full size; records and tables under benchmarks/results/

cuda = @$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make $@ needs a CUDA device \
	and a CUDA build of torch; this is torch " + torch.__version__ + ". Install one: make $@ CONSTRAINTS=/dev/null")'

gpu-self-test: $(READY)  ## ten minutes: numbers, waits, kernels, steps; one record under benchmarks/results/speed
	$(cuda)
	$(BIN)/python benchmarks/device.py

# the field's recipe: teacher and students at full size, images augmented on the device
DATA ?= ../shared/data/cifar100
METHODS ?= supervised,kd,kd-matched,dkd,dtkd-published,dtkd
# every method: make gpu-cifar100 METHODS="$(make -s all-methods)"
ALL_METHODS := $(METHODS),dtkd-max,dtkd-std,entropy,ctkd,cosine,normkd,energy,itkd,dist,ttm,wttm,nkd,lskd,rld,erkd,cskd,r2kd,ats,sp,pkt
SEEDS ?= 3
EPOCHS ?= 240
FULL ?= benchmarks/results/cifar100-resnet32x4-resnet8x4
gpu-cifar100: $(READY)  ## CIFAR-100: resnet32x4 -> resnet8x4
	$(cuda)
	$(BIN)/python -m tempering compare cifar100 --methods $(METHODS) --seeds $(SEEDS) --out $(FULL) -- --data $(DATA) \
	--teacher resnet32x4 --student resnet8x4 --epochs $(EPOCHS) --precision bf16-mixed --accelerator cuda

# the table of benchmarks/results/detection-bccd with wider nets, larger images and six times as many epochs; the weights
# of sums over a neck are the published ones by the area of 1333 x 800 images over these, and DTKD is there at a tenth too
BOXES ?= ../shared/data/bccd
NECK := fgd(foreground=0.006, background=0.003, attention=0.003, relation=0.00003)
BOX_ARMS ?= supervised,fgd,$(NECK),mgd(feature=0.00012),inconsistentdetection(base=$(NECK), adversarial=0.00006),sum(supervised, \
	dtkd(hard=0)),sum(supervised, dtkd(hard=0, dynamic=0.3, soft=0.1)),sum(supervised, kd(hard=0, soft=0.4))
BOX_SIZE ?= 416
BOX_EPOCHS ?= 72
BOX_FULL ?= benchmarks/results/detection-bccd-large
gpu-detection: $(READY)  ## any folder in COCO's format, BCCD by itself: fcos_large -> fcos_tiny
	$(cuda)
	$(BIN)/python -m tempering compare detection --methods "$(BOX_ARMS)" --no-controls --seeds $(SEEDS) --out $(BOX_FULL) -- \
	--data $(BOXES) --size $(BOX_SIZE) --teacher fcos_large --student fcos_tiny --epochs $(BOX_EPOCHS) --evaluate-every 12 \
	--teacher-epochs $$((2 * $(BOX_EPOCHS))) --accelerator cuda

# the tables of benchmarks/results/language-shakespeare with nets of 25 and 3 million parameters; then who writes
TEXT ?= ../shared/data/text/lm/tinystories_lower_train.txt.gz
TEXT_ARMS ?= supervised,kd-matched,dtkd,divergence(objective=kl),divergence(objective=reverse_kl),divergence(objective=jsd)
TEXT_EPOCHS ?= 8
TEXT_FULL ?= benchmarks/results/language-stories
WRITES := divergence(objective=kl),divergence(objective=jsd)
TEXTS = $(BIN)/python -m tempering compare language --no-controls --seeds $(SEEDS)
TEXT_NETS = --text $(TEXT) --teacher-width 512 --teacher-layers 8 --student-width 256 --student-layers 4 --length 512 \
	--epochs $(TEXT_EPOCHS) --teacher-epochs $(TEXT_EPOCHS) --teacher-dir $(TEXT_FULL)/data/work/teachers \
	--precision bf16-mixed --accelerator cuda
gpu-language: $(READY)  ## bytes of TinyStories: GPT 8x512 -> 4x256; learned from the data, and from what the models write
	$(cuda)
	$(TEXTS) --methods "$(TEXT_ARMS)" --control "KD, weight-matched" --out $(TEXT_FULL)/data -- $(TEXT_NETS)
	for source in teacher on-policy speculative; do $(TEXTS) --methods "$(WRITES)" --out $(TEXT_FULL)/$$source -- \
	$(TEXT_NETS) --text-source $$source --generated-fraction 0.5 --prompt-length 64 --max-new-tokens 128 || exit 1; done

# the table of DTKD's authors, run again beside KD at DTKD's total weights: days of one core; a killed stage goes on
EVIDENCE ?= benchmarks/results/evidence-
TEACHERS ?= $(EVIDENCE)screen/work/teachers
SCREEN := supervised,kd,kd-matched,dtkd-published,dtkd-max,dtkd-std,dtkd,dtkd-only
SCREEN := $(SCREEN),dkd,dkd-target,dkd-target-dynamic,dkd-rest,dkd-rest-dynamic
CORE := kd-matched,dtkd-published,dtkd,kd,supervised
# tau times the weight of the dynamic term, exact and fixed, at one seed
WEIGHTS := dtkd(dynamic=1),dtkd,dtkd(dynamic=6)
TAUS := sharpness(2),sharpness(4),sharpness(8),static(2),static(4),static(8)
COMPARED = $(BIN)/python -m tempering compare cifar100 --jobs 1 --threads 1 --nice
# one for all stages; bf16 is half the time where the CPU computes in it, and ten times where it does not
PRECISION ?= bf16-mixed
RECIPE = --data $(DATA) --teacher-dir $(TEACHERS) --teacher-epochs 240 --student resnet8 --precision $(PRECISION)
SHORT = --teacher resnet14 --epochs 60
# a teacher is trained by the first run that asks for it; here that is a student of one epoch
TAUGHT = nice -n 19 $(BIN)/python -m tempering run cifar100 $(RECIPE) --method kd --epochs 1 --threads 1 --quiet
WRITTEN = $(BIN)/python benchmarks/evidence.py --teachers $(TEACHERS)

evidence: $(READY)  ## every stage of docs/evidence.md that is open, in the order in which they matter
	@set -e; for stage in teachers screen full ablations others resnet20; do \
	$(MAKE) --no-print-directory evidence-$$stage; done

evidence-teachers: $(READY)
	$(TAUGHT) --teacher resnet14 --out $(EVIDENCE)screen/work/for-resnet14
	$(WRITTEN)

evidence-screen: $(READY)  ## 60 epochs, 3 seeds
	$(COMPARED) --methods '$(SCREEN)' --seeds 3 --out $(EVIDENCE)screen -- $(RECIPE) $(SHORT)
	$(WRITTEN)

evidence-full: $(READY)  ## 240 epochs, 3 seeds
	$(COMPARED) --methods '$(CORE)' --seeds 3 --out $(EVIDENCE)full-resnet14 -- $(RECIPE) --teacher resnet14 --epochs 240
	$(WRITTEN)

evidence-ablations: $(READY)  ## the temperatures or their scale alone (in the screen); tau times weights
	$(COMPARED) --methods dtkd-soften,dtkd-weigh --seeds 3 --out $(EVIDENCE)screen -- $(RECIPE) $(SHORT)
	$(COMPARED) --methods '$(WEIGHTS)' --temperatures '$(TAUS)' --seeds 1 --no-controls --control 'dtkd @ static(4)' \
	--out $(EVIDENCE)ablations -- $(RECIPE) $(SHORT)
	$(WRITTEN)

evidence-others: $(READY)  ## the rest of the screen
	$(COMPARED) --methods ctkd,cosine,standardized,dist --seeds 3 --out $(EVIDENCE)screen -- $(RECIPE) $(SHORT)
	$(WRITTEN)

evidence-resnet20: $(READY)  ## 240 epochs, 3 seeds, the larger teacher
	$(TAUGHT) --teacher resnet20 --out $(EVIDENCE)screen/work/for-resnet20
	$(COMPARED) --methods '$(CORE)' --seeds 3 --out $(EVIDENCE)full-resnet20 -- $(RECIPE) --teacher resnet20 --epochs 240
	$(WRITTEN)

# 5 arms; the temperatures or their scale alone; then tau, at one seed
FIRST = --out $(EVIDENCE)short -- --data $(DATA) --teacher-dir $(TEACHERS) --teacher resnet14 --teacher-epochs 12 \
	--teacher-cache 8 --student resnet8 --epochs 8
evidence-short: TEACHERS = $(EVIDENCE)short/work/teachers
evidence-short: $(READY)  ## a first look, no part of `make evidence`: 8 epochs, a teacher of 12, in float32
	$(COMPARED) --methods '$(CORE),dtkd-soften,dtkd-weigh' --seeds 3 $(FIRST)
	$(COMPARED) --methods dtkd --temperatures 'static(2),sharpness(2),static(8),sharpness(8)' --seeds 1 --no-controls $(FIRST)
	$(WRITTEN)

# the temperature arena of docs/decisions/arena-16.md: on any machine, seed by seed; what was stopped is resumed
ARENA16 ?= benchmarks/results/arena16
SEEDS16 ?= 0 1 2 3 4 5 6 7
EPOCHS16 ?= 20
VIEWS16 ?= 8
STAGE16 ?= grid
ARMS16 ?= supervised,kd,dtkd-soften,dtkd,dtkd-published,dtkd-max,dtkd-std
PILOT16 := supervised,dtkd,dtkd-soften,dtkd-published
# KD with equal weights at these; "own" is 4
POLICIES16 ?= own,static(1),static(2),static(8),constantratio,standardized(2, scale=tau),curriculum,curriculum(form=instance), \
	cosine,dts,energy,adaptive(4),instance,instance(form=published),instance(form=bandit)
NICE ?= --nice
RUN16 = $(BIN)/python -m tempering compare cifar100 --jobs 1 --threads 1 $(NICE) --no-controls --seeds 1 --first-seed $$seed
FLAGS16 = --data $(DATA) --size 16 --validation 5000 --student resnet8 --teacher resnet20 --teacher-cache $(VIEWS16) \
	--teacher-weights $(ARENA16)/teacher/resnet20.safetensors --epochs $(EPOCHS16) --evaluate-every 2
arena16: arena16-runs  ## does a dynamic temperature beat the best fixed one? 8 seeds of 22 methods, 10 minutes of a core each
	$(BIN)/python benchmarks/leaderboard.py

arena16-runs: $(READY)
	@set -e; for seed in $(SEEDS16); do \
	$(RUN16) --methods kd-matched --temperatures '$(POLICIES16)' --out $(ARENA16)/$(STAGE16) -- $(FLAGS16); \
	$(RUN16) --methods '$(ARMS16)' --out $(ARENA16)/$(STAGE16) -- $(FLAGS16); done

arena16-pilot:  ## the spread over seeds, in 4 epochs
	$(MAKE) arena16 STAGE16=pilot EPOCHS16=4 VIEWS16=4 SEEDS16="0 1 2" ARMS16=$(PILOT16) POLICIES16=own

docs: $(READY)  ## the documentation site, in build/site
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[docs]"
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

pages: $(READY)  ## pages made from docstrings, presets and records; the pages of the notebooks, which it runs
	$(BIN)/python docs/tools/papers_page.py .
	$(BIN)/python docs/tools/conformance_page.py .
	$(BIN)/python docs/tools/conformance_table.py .
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/evidence.py
	$(BIN)/python benchmarks/leaderboard.py
	$(BIN)/python docs/tools/notebooks.py

all-methods:
	@echo $(ALL_METHODS)

# environments with pinned versions are made below it; a library whose record is current is skipped
ENVIRONMENTS ?= $(HOME)/.cache/tempering/conformance
conformance: $(READY)  ## the invariants on the losses of other libraries, one record each; docs/conformance-table.md
	$(BIN)/python benchmarks/conformance/run.py --environments $(ENVIRONMENTS)
	$(BIN)/python docs/tools/conformance_table.py .

BENCH ?= step loss fused_linear chunked_losses whole_steps overhead cache speculative augment startup growth roots roofline
# peers without what they depend on, apart from the environment
PEERS ?= build/peers
bench: $(READY)  ## every benchmark, side by side with peers; CSVs under benchmarks/results/speed and docs/performance.md
	@test -d $(PEERS) || $(BIN)/python -m pip install --quiet --no-deps --target $(PEERS) liger-kernel torchtune
	@test -d $(PEERS)/images || $(BIN)/python -m pip install --quiet --no-deps --target $(PEERS)/images timm "torchvision<0.29"
	@set -e; for name in $(BENCH); do PYTHONPATH=$(PEERS) $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/page.py

wheel: $(READY)  ## build sdist and wheel; install the wheel into an empty environment and use it in an empty folder
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	.ci/try_wheel "$(PYTHON)" "$(CONSTRAINTS)"

oldest:  ## a quick suite with the oldest versions that pyproject.toml allows
	@mkdir -p build
	$(PYTHON) docs/tools/oldest.py pyproject.toml data report tune huggingface conformance > build/oldest.txt
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet -r build/oldest.txt
	build/oldest/bin/python -m pip install --quiet --no-deps -e .
	build/oldest/bin/python -m pytest -q -n auto tests/test_rows.py tests/test_objectives.py tests/test_methods.py \
	tests/test_contract.py tests/test_engine.py tests/test_checkpoints.py tests/test_resume.py tests/test_tune.py \
	tests/test_kernels.py tests/test_adapters.py tests/test_export.py tests/test_cli.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
