//! JSON that hides nothing: an object keeps every member, also one whose name comes twice.
//!
//! `serde_json::Value` lets the last of two equal names win, so two readers of one file may see two
//! different models. Both formats read here, the header of a shard and the index of a checkpoint,
//! know only texts, sizes, lists of sizes, and objects of these inside one object. Anything else is
//! kept as the words that an error message needs: held in full, a stranger's nested objects would
//! take fifty times their bytes. Nesting is bounded by `serde_json` (128 levels) in what is held.

use std::collections::BTreeMap;
use std::fmt;
use std::str;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Objects that may hold one another: the whole, and a tensor's or a map's.
const OBJECTS: u8 = 2;

/// A JSON value, as far as a header or an index may hold it.
pub(crate) enum Value {
    Text(String),
    Size(u64),
    Sizes(Vec<u64>),
    Object(Vec<(String, Value)>),
    /// What no field may hold, in words: "null", "the number -1".
    Other(String),
}

impl Value {
    /// The one value in `json`, or what is there instead.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, String> {
        let text = str::from_utf8(json)
            .map_err(|error| format!("bytes that are not UTF-8 at {}", error.valid_up_to()))?;
        let mut json = serde_json::Deserializer::from_str(text);
        Inside(0)
            .deserialize(&mut json)
            .and_then(|value| json.end().map(|()| value))
            .map_err(|error| format!("malformed JSON: {error}"))
    }
}

/// The members by name, or the name that comes twice.
pub(crate) fn unique(members: Vec<(String, Value)>) -> Result<BTreeMap<String, Value>, String> {
    let mut by_name = BTreeMap::new();
    for (name, value) in members {
        if by_name.contains_key(&name) {
            return Err(name);
        }
        by_name.insert(name, value);
    }
    Ok(by_name)
}

/// The texts of an object by name, or what is there instead.
pub(crate) fn texts(value: Value) -> Result<BTreeMap<String, String>, String> {
    let Value::Object(members) = value else { return Err(value.to_string()) };
    let members = unique(members).map_err(|name| format!("'{name}' more than once"))?;
    let text = |(name, value)| match value {
        Value::Text(text) => Ok((name, text)),
        other => Err(format!("{other} at '{name}'")),
    };
    members.into_iter().map(text).collect()
}

/// As an error message shows it after "found".
impl fmt::Display for Value {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(formatter, "'{text}'"),
            Self::Size(size) => write!(formatter, "{size}"),
            Self::Sizes(sizes) if sizes.len() > 8 => write!(formatter, "a list of {}", sizes.len()),
            Self::Sizes(sizes) => write!(formatter, "{sizes:?}"),
            Self::Object(_) => formatter.write_str("an object"),
            Self::Other(words) => formatter.write_str(words),
        }
    }
}

/// Reads a value inside so many others.
#[derive(Clone, Copy)]
struct Inside(u8);

impl Inside {
    fn deeper(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl<'de> DeserializeSeed<'de> for Inside {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Inside {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_u64<E>(self, size: u64) -> Result<Value, E> {
        Ok(Value::Size(size))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Other(format!("the number {number}")))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Other(format!("the number {number:?}")))
    }

    fn visit_bool<E>(self, truth: bool) -> Result<Value, E> {
        Ok(Value::Other(truth.to_string()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Other("null".to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut sizes = Vec::new();
        let mut stranger = None;
        while let Some(item) = list.next_element_seed(self.deeper())? {
            match item {
                Value::Size(size) => sizes.push(size),
                other => stranger = stranger.or(Some(other)),
            }
        }
        Ok(match stranger {
            None => Value::Sizes(sizes),
            Some(Value::Sizes(_)) => Value::Other("a list that holds a list".to_owned()),
            Some(other) => Value::Other(format!("a list that holds {other}")),
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        if self.0 >= OBJECTS {
            while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(Value::Other("an object".to_owned()));
        }
        let mut members = Vec::new();
        while let Some(name) = object.next_key()? {
            members.push((name, object.next_value_seed(self.deeper())?));
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_stay_in_order_also_when_named_twice() {
        let Ok(Value::Object(members)) = Value::parse(br#"{"b":1,"a":[2],"\u0062":"c"}"#) else {
            panic!("no object");
        };
        let shown: Vec<_> = members.iter().map(|(name, value)| format!("{name} {value}")).collect();
        assert_eq!(shown, ["b 1", "a [2]", "b 'c'"]);
        assert_eq!(unique(members).err().as_deref(), Some("b"));
    }

    #[test]
    fn an_object_inside_the_last_that_a_format_has_is_not_held() {
        let deep = format!("{}0{}", r#"{"":"#.repeat(9), "}".repeat(9));
        let Ok(Value::Object(mut outer)) = Value::parse(deep.as_bytes()) else {
            panic!("no object");
        };
        let Some((_, Value::Object(mut inner))) = outer.pop() else { panic!("no object") };
        assert!(matches!(inner.pop(), Some((_, Value::Other(words))) if words == "an object"));
    }

    #[test]
    fn what_no_field_may_hold_is_named() {
        for (json, words) in [
            ("null", "null"),
            ("true", "true"),
            ("-1", "the number -1"),
            ("18446744073709551616", "the number 1.8446744073709552e19"),
            ("[1,null,{}]", "a list that holds null"),
            ("[[],[1]]", "a list that holds a list"),
            ("[{}]", "a list that holds an object"),
            ("[1,2,3,4,5,6,7,8,9]", "a list of 9"),
        ] {
            assert_eq!(Value::parse(json.as_bytes()).unwrap().to_string(), words, "{json}");
        }
    }
}
