//! Providers whose authors meant well and made one mistake each, in the examples of this package: the conformance kit
//! has to find it and to name it. They share the honest halves of `hostile`.

use std::io::{Read, Seek, SeekFrom};

use fleecebox_guest::{Error, Extent, Objects, StoredObject};

/// The runs in an object of [`hostile::Copy`], each with the position of its bytes.
pub fn index(objects: &Objects, name: &str) -> Result<(StoredObject, Vec<(Extent, u64)>), Error> {
    let mut object = objects.open(name)?;
    let mut runs = Vec::new();
    let mut position = 0;
    while position < object.size() {
        let mut header = [[0; 8]; 2];
        object.seek(SeekFrom::Start(position))?;
        object.read_exact(header.as_flattened_mut())?;
        let [offset, length] = header.map(u64::from_le_bytes);
        position += 16;
        runs.push((Extent { offset, length }, position));
        position += length;
    }
    Ok((object, runs))
}
