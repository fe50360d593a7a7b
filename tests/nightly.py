"""Tests that run every night and before a release, and not with every commit: `make test-all`.

What they check is reached with every commit, too, by a test of one page, model, method or file; they repeat it with the others,
under load, or after a crash.
"""

from __future__ import annotations

NIGHTLY = (
    # The app with twenty clients, after crashes and with hostile files, in a browser: `test_jobs`, `test_uploads`,
    # `test_upload_edges`, `test_request_limits` and `test_html` check the same parts without it.
    "apps/test_browser_trouble.py", "apps/test_clients.py", "apps/test_browser_showcase.py",
    "apps/test_browser_pages.py::test_generate_from_a_sketch", "apps/test_browser_pages.py::test_train_on_digits",
    "apps/test_browser_pages.py::test_inspect", "apps/test_browser_pages.py::test_image_from_the_gallery",
    "apps/test_jobs.py::test_jobs_run_one_at_a_time", "apps/test_server_values.py::test_a_wrong_value",
    "apps/test_personalize_concepts.py::test_train_two_concepts", "apps/test_control_pairs.py::test_train_on_pairs",
    "apps/test_personalize_page.py::test_dry_run",
    # Commands that measure: their parts are checked in the same files and in `benchmarks`.
    "pipelines/test_task_benchmark.py", "pipelines/test_memory_benchmark.py::test_a_step_of_the_bundled",
    "pipelines/test_bench.py::test_all_rows_come_out", "pipelines/test_bench.py::test_contenders_ran",
    "benchmarks/test_switching.py", "benchmarks/test_few_photos.py::test_all_runs",
    "benchmarks/test_few_photos.py::test_scores_are_computed",
    # Separate processes, tables of everything, and models of full size or with every site.
    "hosts/test_published_counts.py::test_the_page", "matrix/test_matrix.py::test_a_unet_adapted_everywhere",
    "test_example_package.py::test_its_own_conformance_tests_pass", "base_models/test_hub.py::test_unreachable_hub",
    "pipelines/test_convert_full_size.py::test_a_conversion", "hub/test_push.py::test_command_line",
    "captioning/test_caption.py::test_command_line", "training/test_memory_check.py::test_several_changes",
    "training/test_memory_prediction.py::test_the_prediction_is", "training/test_option_conflicts.py::test_memory_is",
    "methods/test_p_plus.py::test_counts_of_full_size", "pipelines/test_quantized.py::test_the_file_records",
    "pipelines/test_prompt_transfer.py::test_task_tuning", "pipelines/test_accelerator.py::test_encoders_leave",
    "pipelines/test_accelerator.py::test_the_host_waits", "pipelines/test_control.py::test_a_dry_run",
    "pipelines/test_search.py::test_the_run_folder",
    # Compiled models: the matrix compiles each of its representatives, and each host.
    "methods/test_chain.py::test_training_compiles_to_one_graph", "injection/test_activation.py::test_a_compiled",
    "injection/test_swap.py::test_a_compiled", "hosts/test_open_clip.py::test_attention_in_training",
    "injection/test_mixed_batch_rows.py::test_a_compiled",
    # Runs that are stopped and resumed: `test_continuation`, `test_resume` and `test_transfer` check others.
    "pipelines/test_search.py::test_a_search_that_is_killed_twice",
    "pipelines/test_transfer_tasks.py::test_a_run_that_was_killed",
    "pipelines/test_datasets.py::test_stop_and_resume_of_a_mixture",
    "pipelines/test_transfer_unlabeled.py::test_a_run_that_stops", "pipelines/test_continuation.py::test_the_losses_on_top",
    "pipelines/test_continuation.py::test_control_continues",
)  # fmt: skip
"""Beginnings of the IDs of tests below `tests`."""

BUT_FIRST = (
    # The same with further methods.
    "classification/test_export_weights.py::test_every_method_is_exported", "classification/test_export_graphs.py::test_",
    "hosts/test_every_architecture.py::test_every_method_attaches", "injection/test_layer_order.py::test_ordered_pairs",
    "training/test_optimizer_names.py::test_every_optimizer", "pipelines/test_continuation.py::test_stopped_and_resumed",
    "pipelines/test_control.py::test_every_method", "pipelines/test_transfer.py::test_saved_equals_loaded",
    "injection/test_quantized_weights.py::test_a_method_trains", "methods/test_controls_exported.py::test_alone",
    "matrix/test_together.py::test_each_is_alone", "methods/test_lora_inits.py::test_conformance",
    "methods/test_output_rotation.py::test_it_passes", "base_models/test_quantization.py::test_conformance",
    "methods/test_chain.py::test_no_state", "pipelines/test_convert.py::test_every_method_is_compared",
    # The same with further models.
    "hosts/test_open_clip.py::test_published_models", "base_models/test_skeletons.py::test_an_architecture_has",
    "pipelines/test_accelerator.py::test_a_run_equals", "training/test_memory_prediction.py::test_",
    "pipelines/test_convert.py::test_a_file_of_a_published_model",
    "pipelines/test_personalize.py::test_a_base_model_in_bfloat16", "pipelines/test_quantization_benchmark.py::test_errors",
    "pipelines/test_accelerator.py::test_encoders_stay", "training/test_param_groups.py::test_the_text_encoder",
    "pipelines/test_personalize.py::test_every_family", "pipelines/test_personalize.py::test_an_ordinary_concept",
    "training/test_sharded_base.py::test_gradients_are", "training/recent_families/test_recent_families.py::test_personalize",
    "training/recent_families/test_recent_families.py::test_memory_of", "hosts/test_timm_fallback.py::test_transfer_trains",
    "training/flow_families/test_runs.py::test_", "training/transformer_families/test_transformer_families.py::test_counted",
    "training/language_model_families/test_language_model_families.py::test_counted",
    "training/video_families/test_video_families.py::test_counted",
    # The same with further files and pages, and in other sizes of the window.
    "apps/test_browser.py::test_every_page_opens", "apps/test_browser_layout.py::test_placeholder_contrast",
    "formats/test_malformed.py::test_a_wrong_loader", "formats/test_lora_reader.py::test_converted", "test_docs.py::test_blocks",
    "formats/test_onetrainer_methods.py::test_every_method", "training/test_memory_check.py::test_quantization_is_not",
    "formats/test_growth.py::test_", "pipelines/test_save_dtype.py::test_files", "test_allocator.py::test_openmp",
    "apps/test_personalize_config.py::test_form_survives", "pipelines/test_convert_config.py::test_a_converted_config",
    "formats/test_image_embeddings.py::test_the_command", "test_config_file.py::test_a_run_is_repeated",
)  # fmt: skip
"""Beginnings of the IDs of tests with parameters that run with every commit for their first parameters alone."""


def nightly(ids: list[str]) -> list[bool]:
    """Whether each of the tests runs nightly alone, by its ID below `tests`, in the order of collection."""
    functions = [name.split("[")[0] for name in ids]
    first = {function: place for place, function in reversed([*enumerate(functions)])}
    return [
        name.startswith(NIGHTLY) or (name.startswith(BUT_FIRST) and first[function] != place)
        for place, (name, function) in enumerate(zip(ids, functions, strict=True))
    ]
