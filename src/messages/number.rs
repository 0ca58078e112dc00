//! Numbers by plain serde, as near to JavaScript's as it lets us: whole ones without a fraction, `null` for NaN. What
//! `JSON.stringify` writes to the last byte is the codec's to write.

use serde::{Deserialize, Deserializer, Serializer};

/// Up to here every whole number is an f64 (`Number.MAX_SAFE_INTEGER`).
const WHOLE_MAX: f64 = 9_007_199_254_740_991.0;

pub(super) fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if serializer.is_human_readable() && number.trunc() == *number && number.abs() <= WHOLE_MAX {
        return serializer.serialize_i64(*number as i64);
    }
    serializer.serialize_f64(*number)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    if deserializer.is_human_readable() {
        return Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN));
    }
    f64::deserialize(deserializer)
}

/// The same for fields that may be absent.
pub(super) mod optional {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(transparent)]
    struct Number(#[serde(with = "super")] f64);

    pub fn serialize<S: Serializer>(number: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        number.map(Number).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        if deserializer.is_human_readable() {
            return Number::deserialize(deserializer).map(|number| Some(number.0));
        }
        Ok(Option::<Number>::deserialize(deserializer)?.map(|number| number.0))
    }
}
