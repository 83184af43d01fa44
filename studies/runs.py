"""The lists: which runs a study has, by their commands, and what is measured of each."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def seeds(numbers, runs):
    """{name: arguments} -> {name_s<seed>: arguments with the seed}."""
    return {f"{name}_s{n}": [*run, f"seed={n}"] for name, run in runs.items() for n in numbers}


WIDE = "pretrain.py configs/pcqm.yaml data=data/qm9.h5 val_size=1000 max_steps=3000 log_every=50"
WIDE = f"{WIDE} lr_warmup_steps=300 lr_cosine_length=3000 val_every=250 num_workers=2 compile=true keep_steps=0,3000"

SMALL = "num_workers=0 log_every=50 lr=1e-3 lr_schedule=cosine inference_batch_size=100 lr_min=1e-6"
SMALL += " model.embedding_dimension=64 model.num_layers=4 model.num_rbf=32"  # for encoders of 64 channels
SMALL = f"{SMALL} model.x_norm_layer=true model.vec_norm_layer=rms model.vec_norm_out=rms".split()


def finetune(config, steps, *more):
    length = f"max_steps={steps} lr_cosine_length={steps} lr_warmup_steps={steps // 15} val_every={steps // 5}"
    return ["finetune.py", f"configs/{config}.yaml", *SMALL, *length.split(), *more]


# 1,000 frames in all; 10,000 labels of QM9, whose geometries the encoders saw
FRAMES = {"aspirin": finetune("md17_aspirin", 1500, "batch_size=8", "test_size=2000")}
LABELS = {"gap": finetune("qm9_gap", 1000, "batch_size=32", "train_split=val", "val_split=train", "val_size=1000")}
# how soon do two cores reach an error, from nothing: a board to compare a fork with. <task>-<error>; say batch_size
SPEEDRUN = {
    "aspirin-1.0": finetune("md17_aspirin", 6000, "batch_size=4", "test_size=2000", "compile=true"),
    **{f"gap-{e}": finetune("qm9_gap", n, "batch_size=32", "compile=true") for e, n in ((150, 6000), (100, 17000))},
}


def probe(target, *more):
    parts = "train_split=val val_split=train train_size=0 val_size=1000"
    return [*f"finetune.py configs/probe_qm9.yaml target={target} {parts}".split(), *more]


# norms of Coord's public code, ours, those of GeoRecon's likely parent
PUBLIC = ["model.x_norm_layer=false", "model.vec_norm_layer=none", "model.vec_norm_out=whiten"]
NORMS = {"public": PUBLIC, "rms": [], "whiten": ["model.vec_norm_layer=whiten", "model.vec_norm_out=whiten"]}


def pretrain(*more, steps=3000, kept=None):
    length = f"max_steps={steps} lr_cosine_length={steps} keep_steps={','.join(map(str, kept or (0, steps)))}"
    return ["pretrain.py", "configs/qm9_small.yaml", "compile=true", *length.split(), *more]


def by_norms(norms, objectives, kept=None):
    return {f"{o}_{n}": pretrain(f"objective={o}", *norms[n], kept=kept) for n in norms for o in objectives}


OBJECTIVES = ("coord", "georecon", "rec_only")
CONTROL = by_norms(NORMS, OBJECTIVES, kept=(0, 100, 300, 1000, 3000))
# Table 1: which reading of "the encoder's output", which norms, which objective make its factor of a thousand?
OUTPUT = by_norms(NORMS | {"none": ["model.vec_norm_layer=none", "model.vec_norm_out=none"]}, OBJECTIVES[:2])
UNTRAINED = ["objective=coord", "model.embedding_dimension=256", "model.num_layers=8", "model.num_rbf=64"]  # QM9's
WIDER = {o: [*WIDE.split(), f"objective={o}"] for o in (*OBJECTIVES, "scd")}
WIDER |= {"scd": [*WIDER["scd"], "model.backbone=adaptive"], "coord_public": [*WIDER["coord"], *PUBLIC]}
UNTRAINED = {f"untrained_{n}_256": pretrain(*UNTRAINED, *NORMS[n], steps=1, kept=(0,)) for n in ("public", "rms")}
READINGS = ("graph", "atoms", "all")  # `of` of lipschitz.py
# the denoising family; its coord and georecon are the rms arms of OUTPUT
ADAPTIVE, PAINN = "model.backbone=adaptive", "model.backbone=painn"
FAMILY = {
    "rec_only": pretrain("objective=rec_only"),
    "frad": pretrain("objective=frad", "data=data/qm9_rotors.h5"),
    "scd": pretrain("objective=scd", ADAPTIVE),
    "coord_adaptive": pretrain("objective=coord", ADAPTIVE),  # SCD with the mask token always, too
    "coord_painn": pretrain("objective=coord", PAINN),
    "georecon_painn": pretrain("objective=georecon", PAINN),
}
STARTS = {"untrained": "output_norm/coord_rms"} | {o: f"output_norm/{o}_rms" for o in OBJECTIVES[:2]}
STARTS |= {run: f"family/{run}" for run in FAMILY}
STARTS |= {f"untrained_{network}": f"family/coord_{network}" for network in ("adaptive", "painn")}
READOUT = {f"readout-{y}": probe(y) for y in ("H", "U0", "gap")}  # linear, of the frozen encoder
NETWORKS = {  # SCD's network helps: is it the gate, or more parameters? Does it help GeoRecon?
    "coord_ungated": pretrain("objective=coord", "model.backbone=ungated"),
    "coord_wider": pretrain("objective=coord", "model.embedding_dimension=80"),
    "georecon_adaptive": pretrain("objective=georecon", ADAPTIVE),
}
# Table 11's system, sized for two cores: by its own task, and with reconstruction
UNIMOL = ["data=data/qm9_druglike.h5", "keep_steps=0"]
UNIMOL = {f"unimol{k}": ["pretrain.py", f"configs/unimol_small{k}_pretrain.yaml", *UNIMOL] for k in ("", "_rec")}
MOLNET = ["head=pooler", "compile=true", "max_steps=1000", "lr_cosine_length=1000", "lr_warmup_steps=60"]
MOLNET = {s: ["finetune.py", f"configs/molnet_{s}.yaml", *MOLNET] for s in ("freesolv", "lipo", "qm7", "qm8")}
MOLNET["qm7-repaired"] = [*MOLNET["qm7"], "data=data/qm7_repaired.h5"]  # with the labels of its own molecules
MOLNET_STARTS = {**{u: f"unimol/{u}" for u in UNIMOL}, "untrained": "unimol/unimol", "untrained_et": STARTS["coord"]}
LONG = {f"{o}_rms": pretrain(f"objective={o}", steps=20000, kept=(0, 1000, 3000, 8000, 20000)) for o in OBJECTIVES}
# the same molecule in frames of 500 K: a noised geometry no longer tells the clean one
THERMAL = {"_coord": "objective=coord", "": "", "_no_g": "decoder_graph_emb=false", "_rec_only": "objective=rec_only"}
# when is the graph embedding used: one factor at a time from the control's georecon_rms
FACTORS = {
    **{f"alpha{alpha}": pretrain(f"alpha={alpha}") for alpha in (3, 8)},
    **{f"depth{depth}": pretrain(f"decoder_layers={depth}") for depth in (0, 2)},
    "no_vec": pretrain("decoder_vec=false"),
    "no_g": pretrain("decoder_graph_emb=false"),  # what is left of GeoRecon without g
    "w_rec3": pretrain("w_rec=3"),
    **{f"{kind}_pooling": pretrain(f"pooling={kind}") for kind in ("sum", "attention")},
    **{f"thermal{name}": pretrain("data=data/md17_aspirin.h5", *more.split()) for name, more in THERMAL.items()},
    "alpha3_rec_only": pretrain("alpha=3", "objective=rec_only"),  # together what helped
    "alpha3_no_g": pretrain("alpha=3", "decoder_graph_emb=false"),
    "coord_noise3": pretrain("objective=coord", "position_noise_scale=0.12"),  # alpha = 3's, alone
}
# is the rough embedding the clean loss's? Of alpha, is it the noise, or the weight, alpha^2 w_rec?
WEIGHTS = {f"w_clean{w}": pretrain(f"w_clean={w}") for w in (0.01, 0.1, 0.3, 3)}
ALPHAS = ((3, 0.45), (3, 0.05), (1, 4.05), (1.35, 0.45), (1.35, 0.247))
WEIGHTS |= {f"alpha{a}_w{w}": pretrain(f"alpha={a}", f"w_rec={w}") for a, w in ALPHAS}
WEIGHTS["jittered"] = pretrain("data=data/qm9_jittered.h5")  # no geometry is relaxed: 0.005 angstrom of noise in it


def from_own_seed(tasks, encoders, numbers=(1, 2)):
    """Each task from each encoder, "untrained" ones, too; pretraining and fine-tuning have the same seed."""
    more = {}
    for start, encoder in encoders.items():
        weights = "step_0.pt" if start.startswith("untrained") else "encoder.pt"
        more |= {f"{start}_s{n}": [f"init_from=out/{encoder}_s{n}/{weights}", f"seed={n}"] for n in numbers}
    return {f"{task}_{s}": [*run, *w] for task, run in tasks.items() for s, w in more.items()}


# Table 10, with Table 13's size for MD17: pretrained and fine-tuned on 3BPA. Of the set at 1200 K we have a part
TABLE10 = ["pretrain.py", "configs/3bpa_pretrain.yaml", "compile=true", "keep_steps=0"]
TABLE10 = {o: [*TABLE10, f"objective={o}"] for o in OBJECTIVES}
HOT = ["finetune.py", "configs/3bpa.yaml", "compile=true", "test_split=test_300K,test_600K,test_1200K_reduced"]
HOT = {"3bpa": HOT, "3bpa-clipped": [*HOT, "clip_norm=10"]}  # a first gradient may be 1e5
HOT_STARTS = {o: f"table10/{o}" for o in OBJECTIVES} | {"untrained": "table10/coord"}
# Table 3 at the paper's size, two cycles of its schedule; pretrained on QM9 for 3,000 steps of 32
LARGER = ["model.embedding_dimension=128", "model.num_layers=6", *PUBLIC[:2]]
TABLE3 = {o: pretrain(f"objective={o}", *LARGER, kept=(0,)) for o in OBJECTIVES[:2]}
MD17 = {m: f"configs/md17_{m}.yaml" for m in ("malonaldehyde", "benzene", "aspirin")}
MD17 = {m: ["finetune.py", path, "max_steps=60000", "compile=true", "num_workers=0"] for m, path in MD17.items()}
MD17_STARTS = {o: f"table3/{o}" for o in TABLE3} | {"untrained": "table3/coord"}
TARGETS = "mu,alpha,homo,lumo,gap,r2,zpve,U0,U,H,G,Cv"  # Fig. 3, of the same encoders
STUDIES = {
    # results/encoders/*.pt, which have not seen the splits val and test
    "encoders": seeds((1,), {o: pretrain("split=train", f"objective={o}", steps=6000) for o in OBJECTIVES[:2]}),
    "qm9_wide": seeds((1,), WIDER),  # at the paper's width, on a GPU
    "control": seeds((1, 2), CONTROL),  # how smooth is h, by objective and by norms, over the steps
    "output_norm": seeds((1, 2, 3), OUTPUT) | seeds((1,), UNTRAINED),
    "family": seeds((1, 2, 3), FAMILY | NETWORKS),  # the denoising family on equal footing
    "family_long": seeds((1,), {"scd": pretrain("objective=scd", ADAPTIVE, steps=20000)}),  # is g used more then?
    "family_finetune": from_own_seed(READOUT | FRAMES | LABELS, STARTS, (1, 2, 3)),
    "family_weights": seeds((1, 2, 3), WEIGHTS),
    "table10": seeds((1, 2, 3), TABLE10) | from_own_seed(HOT, HOT_STARTS, (1, 2, 3)),
    "table3": seeds((1, 2, 3), TABLE3) | from_own_seed(MD17, MD17_STARTS, (1, 2, 3)),
    "figure3": from_own_seed({"all": probe(TARGETS)}, MD17_STARTS, (1, 2, 3)),
    "speedrun": seeds((1,), SPEEDRUN),
    "unimol": seeds((1, 2, 3), UNIMOL | {"unimol_rec_no_g": [*UNIMOL["unimol_rec"], "decoder_graph_emb=false"]}),
    "molnet": from_own_seed(MOLNET, MOLNET_STARTS, (1, 2, 3)),
    "control_long": seeds((1,), LONG),  # the objectives at equal norms, for longer
    "alpha": seeds((1, 2), {f"alpha{a}": pretrain(f"alpha={a}") for a in (1.15, 1.2, 1.35, 1.5)}),  # Table 5
    "graph_embedding": seeds((1, 2), FACTORS),
    # what bfloat16 products cost, beside arms of the control
    "precision": seeds((1,), {f"{o}_bf16": pretrain(f"objective={o}", "precision=bf16") for o in OBJECTIVES[:2]}),
    "thermal": from_own_seed(FRAMES, {t[1:] or "georecon": f"graph_embedding/thermal{t}" for t in THERMAL}),
}
EQUAL_ARMS = ("coord_rms", "georecon_rms")  # of other studies, to compare with
BESIDE = dict.fromkeys(("graph_embedding", "alpha", "precision"), {"control": EQUAL_ARMS})
BESIDE |= {"family_long": {"control_long": ("georecon_rms",)}, "unimol": {"molnet": None}}
BESIDE["family_weights"] = {"output_norm": EQUAL_ARMS, "family": ("rec_only",)}
BESIDE["family"] = {"output_norm": EQUAL_ARMS, "family_finetune": None}  # None: all of them
READ = ("output_norm", "qm9_wide", "family", "family_weights", "encoders", "table10")  # at two places
SMOOTHNESS = ("control", "control_long", "alpha", "graph_embedding")
NOISES = (0.01, 0.04)  # angstrom, where the smoothness of the last step is measured too


def analyses(study, run):
    """What is measured of a finished pretraining run: {key: (command, file, key in the file)}."""
    stage, _, *given = STUDIES[study][run]
    if study not in (*SMOOTHNESS, *READ) or stage == "finetune.py":
        return {}
    out, given = f"out/{study}/{run}", dict(argument.split("=", 1) for argument in given)
    on_qm9 = given.get("data", "data/qm9").startswith("data/qm9")
    data = ["data=data/qm9.h5", "split=test"] if on_qm9 else [f"data={given['data']}"]
    steps = [f"{out}/step_{step}.pt" for step in given["keep_steps"].split(",")]
    if study == "table10":  # its config names the data; its last weights are in encoder.pt
        data, steps = ["data=data/3bpa.h5", "split=test_300K"], [*steps, f"{out}/encoder.pt"]

    def llc(place, checkpoints, *how):
        few = [*data, "num_molecules=32", "iterations=15", *how, f"out_dir={out}/{place}"]
        return ["lipschitz.py", *checkpoints, *few], f"{out}/{place}/lipschitz.json", "summary"

    if study in READ:
        readings = {"output_norm": READINGS, "qm9_wide": READINGS[::2]}.get(study, READINGS[:1])
        places = [(of, noise) for of in readings for noise in (0, NOISES[-1])]
        return {f"{of}_{n}": llc(f"{of}_{n}", steps, f"of={of}", f"position_noise_scale={n}") for of, n in places}
    found = {"smoothness": llc("clean", steps)}
    found |= {f"{of}_0": llc(f"{of}_0", steps, f"of={of}") for of in READINGS[1:] if study == "control_long"}
    found |= {f"noised_{n}": llc(f"noised_{n}", [f"{out}/last.pt"], f"position_noise_scale={n}") for n in NOISES}
    if given.get("objective") != "coord" and given.get("decoder_graph_emb") != "false":
        use = ["-m", "studies.graph_embedding", f"{out}/step_0.pt", f"{out}/last.pt", *data, f"out_dir={out}/use"]
        found["graph_embedding"] = use, f"{out}/use/graph_embedding.json", "checkpoints"
    readout = [*probe("H", f"init_from={out}/encoder.pt"), f"out_dir={out}/probe"]
    return found | ({"probe_H": (readout, f"{out}/probe/metrics.json", "test")} if on_qm9 else {})
