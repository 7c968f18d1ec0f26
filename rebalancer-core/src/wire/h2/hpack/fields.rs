//! The static table (RFC 7541, appendix A) and the dynamic table (section 2.3.2).
//!
//! Input and output: header fields. Must never hold more than its size allows.

use std::{collections::VecDeque, sync::Arc};

/// What an entry costs beyond its octets (RFC 7541, section 4.1).
pub const OVERHEAD: usize = 32;

#[rustfmt::skip]
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// How many fields the static table has.
pub const STATIC_FIELDS: usize = STATIC.len();

/// A field of a dynamic table, in one allocation that two tables may share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    octets: Arc<[u8]>,
    name_end: usize,
}

impl Entry {
    /// One for that field.
    pub fn new(name: &[u8], value: &[u8]) -> Self {
        Self {
            octets: [name, value].concat().into(),
            name_end: name.len(),
        }
    }

    fn field(&self) -> (&[u8], &[u8]) {
        self.octets.split_at(self.name_end)
    }

    /// What it counts for (RFC 7541, section 4.1).
    pub fn cost(&self) -> usize {
        self.octets.len() + OVERHEAD
    }
}

/// The fields an index can name.
#[derive(Debug)]
pub struct Fields {
    dynamic: VecDeque<Entry>,
    size: usize,
    capacity: usize,
}

impl Fields {
    /// An empty dynamic table of `capacity` (RFC 7541, section 4.1).
    pub fn new(capacity: usize) -> Self {
        Self {
            dynamic: VecDeque::new(),
            size: 0,
            capacity,
        }
    }

    /// How much the dynamic table may hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The field at an index from 1 on: static ones first, then dynamic ones, newest first (section 2.3.3).
    pub fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let index = index.checked_sub(1)?;
        if let Some((name, value)) = STATIC.get(index) {
            return Some((name.as_bytes(), value.as_bytes()));
        }
        self.dynamic.get(index - STATIC.len()).map(Entry::field)
    }

    /// The index of a field of the dynamic table.
    pub fn find(&self, name: &[u8], value: &[u8]) -> Option<usize> {
        let at = self.dynamic.iter().position(|entry| entry.field() == (name, value))?;
        Some(STATIC.len() + 1 + at)
    }

    /// Adds a field, evicting the oldest; one that is larger than the table empties it (section 4.4).
    pub fn insert(&mut self, entry: Entry) {
        let cost = entry.cost();
        if cost > self.capacity {
            self.dynamic.clear();
            self.size = 0;
            return;
        }
        self.size += cost;
        self.dynamic.push_front(entry);
        self.evict();
    }

    /// Changes the size, evicting what no longer fits (section 4.3).
    pub fn resize(&mut self, capacity: usize) {
        self.capacity = capacity;
        self.evict();
    }

    fn evict(&mut self) {
        while self.size > self.capacity {
            let Some(oldest) = self.dynamic.pop_back() else {
                return;
            };
            self.size -= oldest.cost();
        }
        debug_assert_eq!(
            self.size,
            self.dynamic.iter().map(Entry::cost).sum::<usize>(),
            "the table's books are what it holds"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_field_has_the_lowest_dynamic_index_and_the_oldest_is_evicted() {
        let mut fields = Fields::new(80);
        fields.insert(Entry::new(b"a", b"1"));
        fields.insert(Entry::new(b"b", b"2"));
        assert_eq!(fields.get(62), Some((&b"b"[..], &b"2"[..])));
        assert_eq!(fields.get(63), Some((&b"a"[..], &b"1"[..])));
        fields.insert(Entry::new(b"c", b"3"));
        assert_eq!(fields.get(63), Some((&b"b"[..], &b"2"[..])));
        assert_eq!(fields.get(64), None);
        fields.insert(Entry::new(b"long", &[b'x'; 80]));
        assert_eq!(fields.get(62), None);
        assert_eq!(fields.get(0), None);
        assert_eq!(fields.get(2), Some((&b":method"[..], &b"GET"[..])));
        assert_eq!(fields.get(61), Some((&b"www-authenticate"[..], &b""[..])));
    }
}
