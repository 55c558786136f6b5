"""The grader of a course: probes, the answers of a second implementation, known mistakes, and the judge."""
