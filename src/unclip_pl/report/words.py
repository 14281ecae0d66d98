"""Sentences that every report prints."""

TITLE = "Priors, compared"
INTRODUCTION = (
    "unCLIP draws a picture of a caption in two steps. A prior turns the caption into an image embedding z_i of "
    "CLIP; a decoder draws a picture of that embedding. This report sets priors side by side: they answer the "
    "same held-out captions, with the same CLIP, and one decoder draws for all of them. Pictures are judged by "
    "another CLIP and, on drawn shapes, by an exact reader. The ceiling is the true embedding; where a row is "
    "called text, the caption's own embedding takes the place of a prior."
)
LIMITS = (
    "Limits: small pictures and data, small networks trained on few samples, an oracle or a judge CLIP in place "
    "of human raters, one CLIP and one decoder for all priors. What scale would change is not in any interval "
    "here."
)
STATISTICS = (
    "Every interval is 95 %. With several training seeds it covers both what another training seed and what other "
    "captions would change; with one training seed it covers other captions alone. Captions are crossed with "
    "training seeds (every trained prior answers the same ones), so the variance of a mean is that of a two-way "
    "random-effects analysis: A + B − R, and never less than A or B, with A the variance of the seeds' means over "
    "the number of seeds, B that of the captions' means over the number of captions, R the residual mean square "
    "over both; Student's t with Satterthwaite's degrees of freedom, or the normal approximation for one seed. "
    "For Fréchet distances and what is measured between embeddings, B and R come from bootstrap resamples of the "
    "captions, the same for every cell; of a distance near zero they vary more than the distance does, which "
    "makes its intervals rather too wide. Every training seed is sampled with noise of its own, so another "
    "sampling seed's part lies in A and R. What was fitted once (a linear map, a decoder, the text and true "
    "embeddings) has sampling seeds alone: its interval holds no other training. Comparisons are paired: seed k "
    "of every prior saw the data in the same order, and their pictures of a caption start from the same decoder "
    "noise. Precision, recall, density and coverage are means over pictures, the nearest-neighbour balls taken as "
    "given. Win rates: ties count half; beside the interval over seeds and captions stands the paper's normal "
    "approximation over captions alone. The sign test is exact, over captions, of the mean over training seeds; "
    "ties are set aside. Intervals of shares end at 0 and 100 %; a share that every caption agrees on has "
    "Wilson's interval over captions. Nothing is corrected for how many comparisons there are."
)
RULE = (
    "Matched: the same CLIP, data, decoder, samples seen, batch size and schedule, parameters within 10 %, "
    "guidance 1; the peak learning rate is each prior's own, the one of those tried with the lowest joint_fd at "
    "guidance 1. Ablations of training keep the learning rate of the prior that they ablate. The paper's choices, "
    "tuned for no prior here, are the better of two samples of the diffusion prior, its 64 steps, and the AR "
    "prior's dot-product token from the top half; the diffusion prior's loss draws several noise levels a "
    "caption, which its FLOPs hold. Other rows are the same networks at the guidance with the lowest joint_fd. "
    "joint_fd is the Fréchet distance of pairs (z_i, z_t), on validation embeddings, of a network of another "
    "training seed than the study's, for every prior alike; embed_fd, of z_i alone, does not see captions. Out of "
    "the running is a setting whose samples find their captions' true embeddings (R@10) less than half as often "
    "as another's: a rule added when, on emoji, a network blind to captions had the lowest joint_fd. No test "
    "data, judge or oracle has a say."
)
COSINE = (
    "A cosine to the true embedding rewards collapse: for unit-norm z with m = E[z | caption], a sample of the "
    "truth reaches ‖m‖² on average, the mean itself ‖m‖. So it is read beside the cosine between two samples of a "
    "caption, which is ‖m‖² for a calibrated prior: cos to true = cos between samples, and less of it than that "
    "is a prior surer than right. Such a prior may read better than the ceiling: its samples say what captions "
    "say more plainly than true embeddings do."
)
GRID = (
    "Each row starts from the same noise, of the first training seed. Left to right: the true picture, one "
    "picture for each prior through one decoder, then other decoders or the true embedding without its caption, "
    "where measured."
)
MANY = "Several pictures of one caption, for each prior that sees the caption alone."
CAPTIONS = {
    "metrics": (
        "Dots are means, bars 95 % intervals; what sees the true embedding is hollow. ↑ more is better, ↓ less is."
    ),
    "head_to_head": ("The same caption, the same decoder noise: which prior's picture scores better? Ties count half."),
    "calibration": (
        "A prior that samples from the true distribution lies on the dashed line. Above it samples are too "
        "spread; below it they are too much alike. A regression onto the mean sits far right: a high cosine, and "
        "no choice."
    ),
    "cost": (
        "Time for one embedding against how far the embeddings are from the true ones, both on log scales. Down "
        "and left is better."
    ),
    "ablations": "One choice less the other, in percent of the other's distance, with 95 % intervals.",
    "attributes": (
        "What the oracle reads from real pictures, what CLIP can tell, and what is left after picture → embedding "
        "→ picture. No prior can do better than the decoder lets it."
    ),
    "stages": "Where the time went.",
    "curve": "Along {}; bands are 95 % intervals.",
}
