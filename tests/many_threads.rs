//! Many threads that train, continue texts, load and save on shared models at once. `scripts/check-sanitizers` runs the
//! same under AddressSanitizer and ThreadSanitizer.

#[path = "sanitizers/work.rs"]
mod work;

#[test]
fn sixteen_threads_share_models() -> x_transformers::Result<()> {
    work::run(16, 3)
}
