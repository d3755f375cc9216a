//! Trainers whose parameters are deferred, without ranks: the bits of others, or an error.

use std::sync::Arc;

use x_transformers::{deferred_init, distributed::Alone, train::RankOptions};

use super::*;

/// Steps give parameters their values; so does [`ParamMap::materialize`], after which the optimizer goes on where it was.
#[test]
fn deferred_trainers_take_the_steps_of_others() -> Result<()> {
    let folder = Folder::new("deferred");
    for ema_decay in [None, Some(0.9)] {
        let options = TrainOptions { ema_decay, ..options(6) };
        let whole = |steps: u64| -> Result<Trainer> {
            let mut trainer = trainer(0.1, options.clone())?;
            (0..steps).try_for_each(|_| trainer.step().map(drop))?;
            Ok(trainer)
        };
        let mut first = deferred_init(|| trainer(0.1, options.clone()))?;
        let refused = [first.save(&folder.0), first.validate().map(drop), first.evaluate(|_| Ok(()))];
        for refused in refused {
            assert!(refused.unwrap_err().to_string().contains("deferred_init"));
        }
        (0..3).try_for_each(|_| first.step().map(drop))?;
        assert_eq!(bits(&first, &folder.0), bits(&whole(3)?, &folder.0));
        first.save(&folder.0)?;
        let resume = || deferred_init(|| Trainer::resume(&folder.0, text(), device()));
        let expected = |trainer: &Trainer| {
            let other = Folder::new("deferred-result");
            bits(trainer, &other.0)
        };
        let whole = expected(&whole(6)?);
        for materialize in [false, true] {
            let mut resumed = resume()?;
            assert!(resumed.save(&folder.0).is_err());
            if materialize {
                resumed.params().materialize()?;
                assert!(resumed.save(&folder.0).is_err(), "the optimizer has no state yet");
            }
            (0..3).try_for_each(|_| resumed.step().map(drop))?;
            assert_eq!(expected(&resumed), whole, "materialize: {materialize}, {ema_decay:?}");
        }
        let resumed = resume()?;
        resumed.params().materialize()?;
        let mut alone = resumed.with_ranks(Arc::new(Alone), RankOptions { zero: 1, ..Default::default() })?;
        (0..3).try_for_each(|_| alone.step().map(drop))?;
        assert_eq!(expected(&alone), whole, "with ranks, {ema_decay:?}");
    }
    Ok(())
}
