"""Drawing and editing with real, tiny, random pipelines."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from unipic2.core.errors import InputError
from unipic2.core.micro import MAX_TOKENS
from unipic2.core.prompts import DEFAULT_EDIT_NEGATIVE_PROMPT
from unipic2.trainer import SD3Transformer2DKontextModel, StableDiffusion3KontextPipeline
from unipic2.trainer.micro.codec import sample_scenes
from unipic2.trainer.micro.world import render

STEPS = 3


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def call(pipe, *args, **options):
    """Return pictures (N, H, W, 3) in 0..1."""
    options = {"num_inference_steps": STEPS, "output_type": "np", "height": 64, "width": 64, **options}
    return pipe(*args, **options).images


@pytest.fixture(scope="module")
def pictures():
    return [render(scene) for scene in sample_scenes(4, seed=3)]


def test_text_to_image_by_default_at_the_models_own_size(pipeline):
    image = pipeline("a red circle", num_inference_steps=2, generator=seeded(0)).images[0]
    assert isinstance(image, Image.Image) and image.size == (64, 64) and image.mode == "RGB"


def test_same_generator_same_picture(pipeline, pictures):
    for options in ({}, {"image": pictures[0]}):
        first, again, other = (call(pipeline, "a red circle", generator=seeded(s), **options) for s in (1, 1, 2))
        assert np.array_equal(first, again)
        assert np.abs(first - other).max() > 0.02


def test_prompt_image_and_guidance_matter(pipeline, pictures):
    base = call(pipeline, "a red circle", image=pictures[0], generator=seeded(0))
    changes = [
        call(pipeline, "remove the blue cross", image=pictures[0], generator=seeded(0)),
        call(pipeline, "a red circle", image=pictures[1], generator=seeded(0)),
        call(pipeline, "a red circle", generator=seeded(0)),
        call(pipeline, "a red circle", image=pictures[0], generator=seeded(0), guidance_scale=1.0),
        call(pipeline, "a red circle", image=pictures[0], generator=seeded(0), negative_prompt="two squares"),
    ]
    assert all(np.abs(base - change).max() > 1e-3 for change in changes)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("edit", [False, True])
def test_a_batch_equals_its_singles(pipeline, pictures, guidance_scale, edit):
    prompts = ["a red circle", "remove the blue cross", "add a black square"]
    images = pictures[:3] if edit else None
    options = {"guidance_scale": guidance_scale}
    batch = call(pipeline, prompts, image=images, generator=[seeded(i) for i in range(3)], **options)
    for i in range(3):
        single = call(pipeline, prompts[i], image=images and images[i], generator=seeded(i), **options)
        assert np.abs(batch[i] - single[0]).max() < 1e-4


def test_pictures_per_prompt_keep_their_reference(pipeline, pictures):
    prompts = ["make the circle red", "remove the cross"]
    generators = [seeded(i) for i in range(4)]
    batch = call(pipeline, prompts, image=pictures[:2], num_images_per_prompt=2, generator=generators)
    assert len(batch) == 4
    for i in range(4):
        single = call(pipeline, prompts[i // 2], image=pictures[i // 2], generator=seeded(i))
        assert np.abs(batch[i] - single[0]).max() < 1e-4


def test_one_picture_serves_all_prompts(pipeline, pictures):
    prompts = ["make the circle red", "remove the cross"]
    batch = call(pipeline, prompts, image=pictures[0], generator=[seeded(0), seeded(1)])
    for i in range(2):
        single = call(pipeline, prompts[i], image=pictures[0], generator=seeded(i))
        assert np.abs(batch[i] - single[0]).max() < 1e-4


@pytest.mark.parametrize("count", [2, 4])
def test_a_number_of_pictures_that_fits_no_prompts(pipeline, pictures, count):
    with pytest.raises(InputError, match=f"image: found {count} pictures for 3 prompts, expected one picture"):
        call(pipeline, ["a", "b", "c"], image=pictures[:count])


def test_no_picture_in_the_list(pipeline):
    for size in ({}, {"height": None, "width": None}):
        with pytest.raises(InputError, match="image"):
            call(pipeline, "a red circle", image=[], **size)


def test_both_guidance_branches_see_the_reference(pipeline, pictures):
    positions, texts = [], []
    hooks = [
        pipeline.transformer.pos_embed.register_forward_pre_hook(lambda module, args: positions.append(args[0])),
        pipeline.transformer.context_embedder.register_forward_pre_hook(lambda module, args: texts.append(args[0])),
    ]
    call(pipeline, ["make it red", "remove it"], image=pictures[:2], num_inference_steps=1, generator=seeded(0))
    for hook in hooks:
        hook.remove()
    (noisy, reference), (text,) = positions, texts
    encoded = pipeline.encode_reference(pictures[:2], 64, 64)
    assert reference.shape == noisy.shape == (4, 16, 8, 8)
    assert torch.equal(reference, torch.cat([encoded, encoded]))
    assert torch.equal(noisy[:2], noisy[2:])
    assert torch.equal(text[0], text[1]), "one negative prompt for both"
    assert not torch.equal(text[0], text[2]) and not torch.equal(text[2], text[3])


def test_without_guidance_nothing_is_doubled(pipeline, pictures):
    positions = []
    hook = pipeline.transformer.pos_embed.register_forward_pre_hook(lambda module, args: positions.append(args[0]))
    call(pipeline, ["make it red", "remove it"], image=pictures[:2], num_inference_steps=1, guidance_scale=1.0)
    hook.remove()
    assert [p.shape[0] for p in positions] == [2, 2]


def test_callback_runs_and_can_change_the_latents(pipeline, pictures):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    options = {"image": pictures[0], "callback_on_step_end": callback}
    ours = call(pipeline, "a red circle", generator=seeded(0), **options)
    other = call(pipeline, "two squares", generator=seeded(1), **options)
    assert seen[:STEPS] == [(i, (1, 16, 8, 8)) for i in range(STEPS)]
    assert np.array_equal(ours, other), "the last step's latents were replaced by zeros"


def test_tensors_are_references_too(pipeline, pictures):
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures[:2]])
    by_tensor = call(pipeline, ["a", "b"], image=pixels, generator=seeded(0))
    by_picture = call(pipeline, ["a", "b"], image=pictures[:2], generator=seeded(0))
    assert np.abs(by_tensor - by_picture).max() < 1e-4


def test_given_latents_are_where_sampling_starts(pipeline, pictures):
    latents = torch.randn(1, 16, 8, 8, generator=seeded(5))
    given = call(pipeline, "a red circle", image=pictures[0], latents=latents)
    drawn = call(pipeline, "a red circle", image=pictures[0], generator=seeded(5))
    assert np.array_equal(given, drawn)


def test_ready_embeddings(pipeline, pictures):
    embeds = pipeline.encode_prompt(["make it red"], None, None)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    ready = call(pipeline, image=pictures[0], generator=seeded(0), **dict(zip(names, embeds, strict=True)))
    assert np.array_equal(ready, call(pipeline, "make it red", image=pictures[0], generator=seeded(0)))


# Sizes


def test_an_edit_takes_the_shape_of_its_picture(pipeline, pictures):
    wide = pictures[0].resize((100, 50))
    image = pipeline("make it red", image=wide, longer_edge=128, num_inference_steps=1).images[0]
    assert image.size == (128, 64)


def test_pictures_of_any_size_are_resized(pipeline, pictures):
    images = [pictures[0], pictures[1].resize((31, 200))]
    assert call(pipeline, ["a", "b"], image=images, num_inference_steps=1).shape == (2, 64, 64, 3)


@pytest.mark.parametrize(
    ("size", "name", "nearest"),
    [
        ({"height": 65, "width": 64}, "height", 64),
        ({"height": 64, "width": 72}, "width", 80),
        ({"height": 8, "width": 64}, "height", 16),
        ({"height": 0, "width": 64}, "height", 16),
        ({"height": 64, "width": 1024}, "width", 256),
        ({"height": -64, "width": 64}, "height", 16),
    ],
)
@pytest.mark.parametrize("edit", [False, True])
def test_sizes_that_cannot_be_drawn_name_the_nearest(pipeline, pictures, size, name, nearest, edit):
    expected = (
        rf"{name}: found {size[name]}, expected a multiple of 16 from 16 to 256.*nearest valid {name} is {nearest}\."
    )
    with pytest.raises(InputError, match=expected):
        call(pipeline, "a red circle", image=pictures[0] if edit else None, **size)


def test_a_longer_edge_out_of_range(pipeline, pictures):
    with pytest.raises(InputError, match="longer_edge: found 7000"):
        pipeline("make it red", image=pictures[0], longer_edge=7000)


def test_one_given_edge_is_not_dropped(pipeline, pictures):
    """Either both edges are asked for, or the given one holds."""
    try:
        images = call(pipeline, "make it red", image=pictures[0], height=128, width=None, longer_edge=64)
    except InputError:
        return
    assert images.shape[1] == 128


# Pictures of other kinds


def picture_of(mode: str) -> tuple[Image.Image, Image.Image]:
    """Return a picture in `mode` and what it looks like in 8-bit RGB: alpha lies over white."""
    rgb = render(sample_scenes(1, seed=9)[0])
    alpha = Image.new("L", rgb.size, 255)
    alpha.paste(0, (0, 0, 32, 64))
    over_white = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    gray = rgb.convert("L")
    if mode == "RGBA":
        return Image.merge("RGBA", (*rgb.split(), alpha)), over_white
    if mode == "LA":
        return Image.merge("LA", (gray, alpha)), over_white.convert("L").convert("RGB")
    if mode == "I;16":
        values = np.asarray(gray).astype(np.uint16) * 257
        return Image.fromarray(values), gray.convert("RGB")
    picture = rgb.convert(mode)
    return picture, picture.convert("RGB")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "I;16"])
def test_pictures_of_every_kind_are_seen_as_they_look(pipeline, mode):
    """An error that says what is wrong would do as well; a wrong picture or a traceback would not."""
    picture, rgb = picture_of(mode)
    assert picture.mode == mode
    try:
        latents = pipeline.encode_reference([picture], 64, 64)
    except InputError:
        return
    torch.testing.assert_close(latents, pipeline.encode_reference([rgb], 64, 64), atol=0.05, rtol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_references_are_resized_bicubically(pipeline, pictures, as_tensor):
    """Shrinking with antialiasing, as the node pack does: both wings must encode the same pixels."""
    large = pictures[0].resize((150, 100), Image.Resampling.NEAREST)
    pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None] / 255
    small = torch.nn.functional.interpolate(pixels, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = pipeline.vae.encode(2 * small - 1).latents
        ours = pipeline.encode_reference(list(pixels) if as_tensor else [large], 64, 64)
    torch.testing.assert_close(ours, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("size", [{}, {"height": None, "width": None}])
@pytest.mark.parametrize("picture_size", [(0, 0), (0, 10), (10, 0)])
def test_pictures_without_pixels(pipeline, size, picture_size):
    with pytest.raises(InputError, match="at least 1"):
        call(pipeline, "make it red", image=Image.new("RGB", picture_size), **size)


# Prompts


def test_the_empty_prompt(pipeline, pictures):
    for options in ({}, {"image": pictures[0]}):
        images = call(pipeline, "", generator=seeded(0), **options)
        assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()


def test_a_very_long_prompt_is_cut_to_the_models_length(pipeline):
    long = ("one red circle and two blue squares " * 300)[:10_000]
    assert len(long) == 10_000
    embeds = pipeline.encode_prompt([long], None, None, do_classifier_free_guidance=False)[0]
    start = " ".join(long.split()[: MAX_TOKENS - 2])
    assert embeds.shape == (1, MAX_TOKENS, 128)
    assert torch.equal(embeds, pipeline.encode_prompt([start], None, None, do_classifier_free_guidance=False)[0])
    assert np.isfinite(call(pipeline, long, generator=seeded(0), num_inference_steps=1)).all()


def test_a_single_word_is_not_spread_over_letters(pipeline):
    one = pipeline.encode_prompt("red", None, None)
    assert one[0].shape == one[1].shape == (1, MAX_TOKENS, 128)
    assert one[2].shape == one[3].shape == (1, 128)
    assert torch.equal(one[1], pipeline.encode_prompt("", None, None)[0])


@pytest.mark.parametrize("negatives", [["a"], ["a", "b", "c"]])
def test_negative_prompts_that_do_not_fit_the_prompts(pipeline, negatives):
    with pytest.raises(ValueError, match="negative_prompt"):
        call(pipeline, ["a red circle", "a blue square"], negative_prompt=negatives)


# Three encoders, as published


def word_tokenizer(text: str) -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *sorted(set(text.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


@pytest.fixture(scope="module")
def three_encoders(tokenizer, randomise, kl_vae):
    """Return a pipeline with two CLIPs, a T5 and a VAE with a posterior, like the published one but tiny."""

    def clip(width, projection):
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
            max_position_embeddings=MAX_TOKENS, projection_dim=projection, vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return CLIPTextModelWithProjection(config).eval()

    torch.manual_seed(0)
    words = word_tokenizer(f"make the red circle blue a photo {DEFAULT_EDIT_NEGATIVE_PROMPT}")
    t5 = T5Config(vocab_size=len(words), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    transformer = SD3Transformer2DKontextModel(
        sample_size=8, num_layers=2, num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=128,
        pooled_projection_dim=20, pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    pipe = StableDiffusion3KontextPipeline(
        transformer=randomise(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae,
        text_encoder=clip(16, 8),
        tokenizer=tokenizer,
        text_encoder_2=clip(24, 12),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5).eval(),
        tokenizer_3=words,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_three_encoders_use_diffusers_own_encoding(three_encoders):
    arguments = {"prompt": ["make the red circle blue"], "prompt_2": None, "prompt_3": None, "negative_prompt": "a"}
    ours = three_encoders.encode_prompt(**arguments)
    theirs = StableDiffusion3Pipeline.encode_prompt(three_encoders, **arguments)
    assert ours[0].shape == (1, MAX_TOKENS + 256, 64) and ours[2].shape == (1, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def negative_read_by_t5(pipe, **options) -> str:
    seen = []
    hook = pipe.text_encoder_3.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = call(pipe, "make the red circle blue", num_inference_steps=1, **options)
    hook.remove()
    assert len(seen) == 2 and np.isfinite(images).all()
    assert seen[0].shape == (1, 256)
    return pipe.tokenizer_3.decode(seen[1][0], skip_special_tokens=True)


def test_edits_get_the_default_negative_prompt(three_encoders, pictures):
    read = negative_read_by_t5(three_encoders, image=pictures[0])
    assert read.split() == DEFAULT_EDIT_NEGATIVE_PROMPT.split()
    assert negative_read_by_t5(three_encoders, image=pictures[0], negative_prompt="a photo") == "a photo"
    assert negative_read_by_t5(three_encoders, image=pictures[0], negative_prompt="") == ""
    assert negative_read_by_t5(three_encoders) == ""


def test_reference_latents_are_the_scaled_mode_or_a_sample(three_encoders, pictures):
    pixels = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = three_encoders.vae.encode(pixels).latent_dist
        mode = three_encoders.encode_reference([pictures[0]], 64, 64)
        sample = three_encoders.encode_reference([pictures[0]], 64, 64, seeded(3), sample_mode="sample")
        expected = posterior.sample(seeded(3))
    torch.testing.assert_close(mode, (posterior.mode() - 0.0609) * 1.5305)
    torch.testing.assert_close(sample, (expected - 0.0609) * 1.5305)
    assert not torch.equal(mode, sample)


def test_per_sample_generators_with_a_sampled_reference(three_encoders, pictures):
    options = {"sample_mode": "sample", "num_inference_steps": 1}
    batch = call(three_encoders, ["a", "make"], image=pictures[:2], generator=[seeded(0), seeded(1)], **options)
    for i, prompt in enumerate(["a", "make"]):
        single = call(three_encoders, prompt, image=pictures[i], generator=[seeded(i)], **options)
        assert np.abs(batch[i] - single[0]).max() < 1e-4


def test_an_unknown_sample_mode(three_encoders, pictures):
    with pytest.raises(InputError, match="sample_mode"):
        call(three_encoders, "a", image=pictures[0], sample_mode="median")
