"""The file formats that conversion reads and writes."""
